"""The residual stream beside attention: looked at, or changed, by ordinary module hooks that are taken off again.

Places of a block: "block_in" and "block_out" (the residual stream), "attention_out" (what the heads write together),
"mlp_hidden" (the features of the feed-forward part, after its activation) and "mlp_out" (what that part writes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.blocks import Block, find_blocks
from headwise.models.open import Opened

PLACES = ("block_in", "block_out", "attention_out", "mlp_hidden", "mlp_out")
Look = Callable[[int, Float[Tensor, "batch token dim"]], Tensor | None]
"""Called with the layer and what is there; a tensor it returns is put in its place."""


@contextmanager
def hidden(
    opened: Opened, looks: Mapping[str, Look], layers: Sequence[int] | None = None, stream: str | None = None
) -> Iterator[None]:
    """Calls `looks[place](layer, x)` in every forward inside the block, for the chosen layers (None: all) of a stream
    (None: the text, or the model's first).

    >>> with hidden(opened, {"block_out": lambda layer, x: x * 1.1 if layer == 3 else None}):
    ...     opened.model(**batch)
    """
    if not looks or set(looks) - set(PLACES):
        raise HeadwiseError(f"looks: wanted some of the places {', '.join(PLACES)}; got {sorted(looks)}.")
    blocks = chosen_blocks(opened, layers, stream)
    with ExitStack() as stack:
        for place, look in looks.items():
            for block in blocks:
                stack.callback(hook(block, place, look).remove)
        yield


def record(
    opened: Opened,
    inputs: Mapping[str, Any],
    places: Sequence[str] = ("block_out",),
    layers: Sequence[int] | None = None,
    stream: str | None = None,
) -> dict[str, Float[Tensor, "layer batch token dim"]]:
    """One forward pass without gradients; what stood at each place, layer by layer. The inputs go to the model as they
    are."""
    seen: dict[str, dict[int, Tensor]] = {place: {} for place in places}

    def keeping(place: str) -> Look:
        def keep(layer: int, x: Tensor) -> None:
            seen[place][layer] = x.detach().clone()

        return keep

    with hidden(opened, {place: keeping(place) for place in places}, layers, stream), torch.no_grad():
        opened.model(**inputs)
    return {place: torch.stack([found[layer] for layer in sorted(found)]) for place, found in seen.items()}


def chosen_blocks(opened: Opened, layers: Sequence[int] | None, stream: str | None) -> list[Block]:
    stream = stream or ("text" if "text" in opened.streams else opened.streams[0])
    blocks = find_blocks(opened.model, opened.sites, stream)
    if layers is None:
        return blocks
    wrong = sorted(set(layers) - {block.layer for block in blocks})
    if wrong:
        raise HeadwiseError(f"layers: the stream {stream!r} has layers 0 to {len(blocks) - 1}; got {wrong}.")
    return [block for block in blocks if block.layer in set(layers)]


def hook(block: Block, place: str, look: Look) -> Any:
    """The hook for one place of one block."""

    def entering(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        key, x = incoming(module, args, kwargs)
        new = look(block.layer, x)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

    def leaving(module: nn.Module, args: tuple, output: Any) -> Any:
        whole = isinstance(output, Tensor)
        new = look(block.layer, output if whole else output[0])
        return None if new is None else new if whole else (new, *output[1:])

    module = {"attention_out": block.site.out, "mlp_hidden": block.last, "mlp_out": block.last}.get(place, block.module)
    if module is None:
        raise HeadwiseError(f"{place}: {block.name} ({type(block.module).__name__}) has no one matrix that makes it.")
    if place in ("block_in", "mlp_hidden"):
        return module.register_forward_pre_hook(entering, with_kwargs=True)
    return module.register_forward_hook(leaving)


def incoming(module: nn.Module, args: tuple, kwargs: dict) -> tuple[str | None, Tensor]:
    """The tokens a module is given: its first argument, or the first tensor among the named ones."""
    if args and isinstance(args[0], Tensor):
        return None, args[0]
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return key, value
    raise HeadwiseError(f"{type(module).__name__} was called without a tensor of tokens.")
