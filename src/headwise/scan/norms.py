"""The norm in front of each attention layer: found by watching which module's output is what the layer's heads read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.models import Opened
from headwise.scan.needs import quiet


@torch.no_grad()
def norms_before(
    opened: Opened, inputs: Mapping[str, Any], stream: str, readers: Mapping[int, nn.Module] | None = None
) -> dict[int, nn.Module]:
    """Layer -> the norm whose output its attention reads, in one forward pass; layers that read something else are left
    out. In a post-norm model that is the norm at the end of the block before. `readers` names other modules to look
    in front of, by a number."""
    if readers is None:
        readers = {s.layer: s.module for s in opened.sites if s.stream == stream and s.kind == "self"}
    written: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are kept, so that no address is used twice
    found: dict[int, nn.Module] = {}

    def remember(module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and is_norm(module):
            written[output.data_ptr()] = (module, output)

    def notice(number: int) -> Any:
        def look(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            for x in (*args, *kwargs.values()):
                if isinstance(x, Tensor) and x.data_ptr() in written:
                    found.setdefault(number, written[x.data_ptr()][0])
                    return

        return look

    hooks = [m.register_forward_hook(remember) for m in opened.model.modules()]
    hooks += [m.register_forward_pre_hook(notice(number), with_kwargs=True) for number, m in readers.items()]
    try:
        opened.model(**inputs, **quiet(opened.model))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def is_norm(module: nn.Module) -> bool:
    """A norm of torch, or what looks like one: no children, and only vectors of one length as parameters."""
    own = list(module.parameters(recurse=False))
    vectors = bool(own) and all(p.ndim == 1 and len(p) == len(own[0]) for p in own)
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or (vectors and not list(module.children()))


@torch.no_grad()
def gain(norm: nn.Module, width: int) -> Float[Tensor, " model"]:
    """The factor per channel, read from the norm's answer to a vector of +1 and -1 that has mean 0 and square mean 1:
    `(norm(x) - norm(-x)) / 2 = gain x`."""
    signs = ones(norm, width)
    signs[1::2] = -1
    return ((norm(signs) - norm(-signs)) / 2 * signs).float()


@torch.no_grad()
def removes_mean(norm: nn.Module, width: int) -> bool:
    """Whether a norm takes the mean off, as LayerNorm does and RMSNorm does not: it then can't tell 1 from -1."""
    return bool(torch.allclose(norm(ones(norm, width)), norm(-ones(norm, width)), atol=1e-4))


def ones(norm: nn.Module, width: int) -> Float[Tensor, " model"]:
    like = next(norm.parameters(), torch.empty(0))
    return torch.ones(width, device=like.device, dtype=like.dtype)
