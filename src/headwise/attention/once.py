"""Small tensors that are made once and found again, so that no layer and no token waits for the device to get them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def once(x: Tensor, what: str, make: Callable[..., T], *arguments: object) -> T:
    """`make(x, *arguments)`, kept as long as the tensor lives and is not written to."""
    version = x._version if not x.is_inference() else 0
    known = _known.setdefault(x, {})
    key = (what, version, *arguments)
    if key not in known:
        known[key] = make(x, *arguments)
    return known[key]


def on(x: Tensor, device: torch.device) -> Tensor:
    """`x.to(device)`, copied once: a copy to the GPU waits for all its work."""
    return x if x.device == device else once(x, "on", Tensor.to, device)


@lru_cache(maxsize=4096)
def numbers(values: tuple[int, ...], device: torch.device) -> Int[Tensor, " value"]:
    """These numbers as a tensor. Not to be written to: it is shared."""
    return torch.tensor(values, dtype=torch.int64, device=device)
