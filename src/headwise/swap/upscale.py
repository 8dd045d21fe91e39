"""Depth up-scaling: a trained decoder made deeper, by blocks that add nothing at first."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention.seam import entrance
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site, find_sites
from headwise.models.open import Opened
from headwise.paper import Paper
from headwise.swap.adapter import arguments_of
from headwise.swap.product_keys import PAPER, ProductKeyMemory

Kind = Literal["memory", "copy", "identity_copy"]


class MemoryBlock(nn.Module):
    """`x + concat_h memory_h(z_h)`, z the heads of `attention(norm(x))` before any output projection: no feed-forward
    part, no residual around the attention, and no mixing of heads. It stands in a transformers decoder as a layer does.

    `gain` [heads] multiplies what each head reads; a 0 knocks a head's memory out.
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        attention: nn.Module,
        norm: nn.Module,
        memory: ProductKeyMemory,
        arguments: Sequence[str] = ("hidden_states",),
    ):
        """arguments: the names of what its host hands over by place."""
        super().__init__()
        self.arguments = tuple(arguments)
        self.self_attn, self.input_layernorm, self.memory = attention, norm, memory
        self.gain: Tensor
        self.register_buffer("gain", torch.ones(memory.heads))

    def forward(self, *args: Any, **given: Any) -> Float[Tensor, "batch token dim"]:
        given = {**dict(zip(self.arguments, args, strict=False)), **given}
        x = given.pop("hidden_states")
        z, *_ = self.self_attn(hidden_states=self.input_layernorm(x), **given)
        read, *_ = self.memory(z.unflatten(-1, (self.memory.heads, -1)))
        return x + (read * self.gain[:, None].to(read)).flatten(2)


@dataclass
class Upscaled:
    """A model with more layers than it had. As a context manager it takes them out at the end."""

    model: nn.Module = field(repr=False)
    places: list[int]
    """The new blocks' numbers among the layers there are now."""
    blocks: list[nn.Module] = field(repr=False)
    _layers: nn.ModuleList = field(repr=False)
    _config: dict[str, Any] = field(repr=False)
    _frozen: list[tuple[nn.Parameter, bool]] = field(repr=False)

    def undo(self) -> None:
        """The model as it was, with what it learned since in its own layers."""
        own = [layer for layer in self._layers if all(layer is not block for block in self.blocks)]
        refill(self._layers, own)
        self.model.config.update(self._config)  # type: ignore[union-attr, operator]
        for parameter, wanted in self._frozen:
            parameter.requires_grad_(wanted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()


def depth_upscale(
    model: Opened | nn.Module,
    at: Sequence[int] | None = None,
    every: int = 2,
    kind: Kind = "memory",
    train: Literal["new", "all"] = "new",
    **memory: Any,
) -> Upscaled:
    """Puts a block behind each of the layers `at` (numbers from 0), by default behind every second one, in place.

    `kind`: "memory", a MemoryBlock with the attention and the first norm of the layer before it, copied, and a
    ProductKeyMemory made with `memory` (n, topk, value_rank ...); "copy", the whole layer once more, which changes the
    output; "identity_copy", the same with its output projections at zero. Memories and identity copies leave the
    output as it was, which is tried out here. `train`: "new" stops the gradients of all other parameters.

    For transformers decoders with pre-norm layers in one list. All layers are numbered anew, and caches work.
    """
    inner = model.model if isinstance(model, Opened) else model
    if kind not in ("memory", "copy", "identity_copy") or train not in ("new", "all"):
        raise HeadwiseError(f"depth_upscale: kind {kind!r} or train {train!r} is none there is; see its help.")
    if memory and kind != "memory":
        raise HeadwiseError(f"depth_upscale: {', '.join(memory)} are of memories; kind is {kind!r}.")
    sites = [site for site in find_sites(inner) if site.kind == "self"]
    layers = layers_of(inner, sites)
    if every < 1:
        raise HeadwiseError(f"depth_upscale: every must be at least 1; got {every}.")
    behind = list(range(every - 1, len(layers), every)) if at is None else sorted(set(at))
    if not behind or not 0 <= behind[0] <= behind[-1] < len(layers):
        raise HeadwiseError(f"depth_upscale: at wants numbers from 0 to {len(layers) - 1}; got {behind}.")
    before = None if kind == "copy" else tried(inner)
    frozen = [(p, p.requires_grad) for p in inner.parameters()]
    sizes = ("num_hidden_layers", "layer_types")
    config = {name: copy.copy(getattr(inner.config, name)) for name in sizes if hasattr(inner.config, name)}
    blocks = [made(kind, layers[n], sites[n], memory) for n in behind]
    grown: list[nn.Module] = []
    for n, layer in enumerate(layers):
        grown += [layer, *(block for m, block in zip(behind, blocks, strict=True) if m == n)]
    refill(layers, grown)
    changed: dict[str, Any] = {"num_hidden_layers": len(grown)}
    if config.get("layer_types"):
        changed["layer_types"] = [
            kind_ for n, kind_ in enumerate(config["layer_types"]) for _ in range(1 + behind.count(n))
        ]
    inner.config.update(changed)  # type: ignore[union-attr, operator]
    if train == "new":
        new = {id(p) for block in blocks for p in block.parameters()}
        for parameter, _ in frozen:
            parameter.requires_grad_(id(parameter) in new)
    places = [n + 1 + i for i, n in enumerate(behind)]
    upscaled = Upscaled(inner, places, blocks, layers, config, frozen)
    if before is not None and not unchanged(inner, before):
        upscaled.undo()
        raise HeadwiseError(
            f"depth_upscale: {type(inner).__name__} gives another output with new blocks that should add nothing: its "
            "layers are not of a kind that this function knows."
        )
    return upscaled


def unchanged(model: nn.Module, before: Tensor) -> bool:
    try:
        return torch.allclose(tried(model), before, atol=1e-4, rtol=1e-4)
    except TypeError:  # an argument that the copied attention doesn't take
        return False


def layers_of(model: nn.Module, sites: list[Site]) -> nn.ModuleList:
    """The list that holds all layers, one attention each."""
    lists = {site.name.rsplit(".", 2)[0] for site in sites}
    found = model.get_submodule(lists.pop()) if len(lists) == 1 else None
    fits = isinstance(found, nn.ModuleList) and len(found) == len(sites) and hasattr(model, "config")
    if not fits or any(
        entrance(site.module) != "registry" or not getattr(site.module, "is_causal", False) for site in sites
    ):
        raise HeadwiseError(f"{type(model).__name__} is no decoder of transformers with all its layers in one list.")
    return found  # type: ignore[return-value]


def refill(layers: nn.ModuleList, new: Sequence[nn.Module]) -> None:
    """Other layers in the same list, numbered from 0 as caches want it."""
    del layers[:]
    layers.extend(new)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]


def made(kind: str, layer: nn.Module, site: Site, memory: dict[str, Any]) -> nn.Module:
    new = copy.deepcopy(layer)
    attention = new.get_submodule(site.name.rsplit(".", 1)[1])
    output = next(name for name, module in site.module.named_modules() if module is site.out)
    if kind == "copy":
        return new
    if kind == "identity_copy":
        inside = {id(module) for module in attention.modules()}
        others = [child for child in new.children() if id(child) not in inside]
        lasts = [[m for m in child.modules() if matrix(m)] for child in others]
        with torch.no_grad():
            for last in [attention.get_submodule(output), *(found[-1] for found in lasts if found)]:
                for parameter in last.parameters():
                    parameter.zero_()
        return new
    if site.heads * site.value_dim != site.W_Q.shape[1]:
        raise HeadwiseError(
            f"depth_upscale: the heads of {site.name} are {site.heads} x {site.value_dim} wide together, which is not "
            f"the model's {site.W_Q.shape[1]}: a memory block has no projection to join them."
        )
    attention.set_submodule(output, nn.Identity())
    like = site.W_Q
    bank = ProductKeyMemory(site.heads, site.value_dim, **memory).to(device=like.device, dtype=like.dtype)
    block = MemoryBlock(attention, first_norm(new), bank, arguments_of(layer)).train(layer.training)
    if hasattr(layer, "attention_type"):
        block.attention_type = layer.attention_type
    return block


def first_norm(layer: nn.Module) -> nn.Module:
    """The norm in front of a pre-norm layer's attention: the first of its children that is one."""
    for child in layer.children():
        if type(child).__name__.endswith("Norm"):
            return child
    raise HeadwiseError(f"{type(layer).__name__} has no norm in front of its attention.")


def matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


@torch.no_grad()
def tried(model: nn.Module) -> Float[Tensor, "one token vocabulary"]:
    """Logits of a few tokens."""
    device = next(model.parameters()).device
    mode = model.training
    try:
        return model.eval()(input_ids=torch.arange(1, 6, device=device)[None], use_cache=False)[0]
    finally:
        model.train(mode)
