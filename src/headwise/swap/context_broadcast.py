"""The mean of all tokens added to each of them: uniform attention for nothing, so that heads needn't learn it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attention.incoming import past_length, some_padding
from headwise.errors import HeadwiseError
from headwise.models.anatomy import find_sites
from headwise.models.blocks import find_blocks, matrices
from headwise.models.open import Opened
from headwise.paper import Paper
from headwise.swap.cache import Cache
from headwise.swap.convert import Layers, chosen_layers

Mode = Literal["mean", "scaled", "convex"]
PLACES = ("mlp_end", "mlp_mid", "mlp_front")
MODULE = "context_broadcast"


class ContextBroadcast(nn.Module):
    """With m the mean of the sequence's tokens: `(x_i + m) / 2` (mode "mean", CB, no parameters), `x_i + L m`
    ("scaled", CB_S) or `(1 - L) x_i + L m` ("convex"), L [dim] learned from 0, where nothing changes.

    `mask` [batch, token]: the tokens that are no padding, the only ones in the mean. `exclude_first` leaves the first
    (class) token out of it. `causal` (ours): the mean of the tokens so far, which with a `cache` goes on where the last
    call stopped. To train with: in a trained model CB halves what tokens have of their own.
    """

    paper: ClassVar[Paper] = Paper("Scratching Visual Transformer's Back with Uniform Attention", "2210.08457")

    def __init__(
        self, dim: int | None = None, mode: Mode = "mean", *, exclude_first: bool = False, causal: bool = False
    ):
        super().__init__()
        if mode not in ("mean", "scaled", "convex"):
            raise HeadwiseError(f"ContextBroadcast: mode is mean, scaled or convex; got {mode!r}.")
        if (dim is None) != (mode == "mean"):
            raise HeadwiseError(f'ContextBroadcast: dim is for the modes "scaled" and "convex"; got {dim}, {mode!r}.')
        if causal and exclude_first:
            raise HeadwiseError("ContextBroadcast: a causal mean without the first token leaves that without any.")
        self.mode, self.exclude_first, self.causal = mode, exclude_first, causal
        self.share = None if dim is None else nn.Parameter(torch.zeros(dim))

    def forward(
        self,
        x: Float[Tensor, "batch token dim"],
        mask: Bool[Tensor, "batch token"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        if cache is not None and not self.causal:
            raise HeadwiseError("ContextBroadcast: a cache is for causal means: make it with causal=True.")
        kept = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x)
        if self.exclude_first:
            kept = torch.cat([torch.zeros_like(kept[:, :1]), kept[:, 1:]], 1)
        wide = torch.promote_types(x.dtype, torch.float32)  # long sums
        total, count = self.sums((x * kept).to(wide), kept.to(wide), cache)
        mean = (total / count.clamp(min=1)).to(x.dtype)
        if self.share is None:
            return (x + mean) / 2
        return (x if self.mode == "scaled" else (1 - self.share) * x) + self.share * mean

    def sums(self, x: Tensor, kept: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Sum and number of the tokens in each token's mean."""
        if not self.causal:
            return x.sum(1, keepdim=True), kept.sum(1, keepdim=True)
        total, count = x.cumsum(1), kept.cumsum(1)
        if cache is not None:
            entries = cache.of(self)
            if entries.length:
                total, count = total + entries.states["total"], count + entries.states["count"]
            entries.put(total=total[:, -1:], count=count[:, -1:])
            entries.length += x.shape[1]
        return total, count


@dataclass
class Broadcasting:
    """A model with context broadcasting in it. As a context manager it takes it out at the end."""

    model: nn.Module = field(repr=False)
    modules: dict[str, ContextBroadcast] = field(repr=False)
    """By the name of the block they are in, whose parameters and state they belong to."""
    handles: list[Any] = field(repr=False)

    def undo(self) -> None:
        for handle in self.handles:
            handle.remove()
        for name in self.modules:
            delattr(self.model.get_submodule(name), MODULE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()


def broadcast_context(
    model: Opened | nn.Module,
    where: Literal["mlp_end", "mlp_mid", "mlp_front"] = "mlp_end",
    mode: Mode = "mean",
    layers: Layers = None,
    exclude_first: bool = False,
) -> Broadcasting:
    """Puts context broadcasting into the feed-forward parts of a model: on what they write ("mlp_end", before it is
    added), on their hidden features ("mlp_mid") or on what they read ("mlp_front"). Causal models get causal means, and
    must then generate with use_cache=False. Padding is known from the `attention_mask` that the model is called with.
    """
    inner = model.model if isinstance(model, Opened) else model
    if where not in PLACES:
        raise HeadwiseError(f"where: one of {', '.join(PLACES)}; got {where!r}.")
    sites = [site for site in find_sites(inner) if site.kind == "self"]
    streams = list(dict.fromkeys(site.stream for site in sites))
    stream = "text" if "text" in streams else next(iter(streams), "text")
    blocks = find_blocks(inner, sites, stream)
    if any(hasattr(block.module, MODULE) for block in blocks):
        raise HeadwiseError("broadcast_context: this model has it already: undo that first.")
    seen = Seen()
    made, handles = {}, [inner.register_forward_pre_hook(seen.read, with_kwargs=True)]
    for block in (blocks[n] for n in chosen_layers(layers, len(blocks))):
        if block.last is None:
            raise HeadwiseError(f"broadcast_context: {block.name} has no feed-forward part with one last matrix.")
        *first, last = matrices(block.module, block.site)
        dim = None if mode == "mean" else width(first[0] if where == "mlp_front" else last, where != "mlp_end")
        causal = bool(getattr(block.site.module, "is_causal", False))
        made[block.name] = module = ContextBroadcast(dim, mode, exclude_first=exclude_first, causal=causal)
        block.module.add_module(MODULE, module.to(next(last.parameters())))
        if where == "mlp_end":
            handles.append(last.register_forward_hook(partial(after, module, seen)))
        for matrix in {"mlp_mid": [last], "mlp_front": first}.get(where, []):
            handles.append(matrix.register_forward_pre_hook(partial(before, module, seen)))
    return Broadcasting(inner, made, handles)


class Seen:
    """The padding of the forward that is going on."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def read(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if past_length(kwargs):
            raise HeadwiseError("broadcast_context: means can't go on from a cache of transformers: use_cache=False.")
        self.mask = some_padding(kwargs.get("attention_mask"))


def after(module: ContextBroadcast, seen: Seen, _: nn.Module, args: tuple, out: Tensor) -> Tensor:
    return module(out, seen.mask)


def before(module: ContextBroadcast, seen: Seen, _: nn.Module, args: tuple) -> tuple:
    return (module(args[0], seen.mask), *args[1:])


def width(matrix: nn.Module, entering: bool) -> int:
    """How wide what enters or leaves a matrix is; those of GPT-2 are stored the other way round."""
    shape = next(p.shape for p in matrix.parameters() if p.ndim == 2)
    out, into = shape if isinstance(matrix, nn.Linear) else shape[::-1]
    return into if entering else out
