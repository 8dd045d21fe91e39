"""The per-head views of an attention layer's weights, in the convention `x @ W`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.projections import BLOCKS, QUARTERS, Projections, fused_order, matrix, vector

if TYPE_CHECKING:
    from headwise.models.anatomy import Site


MIXED = ("DiffLlamaAttention",)


@dataclass(frozen=True)
class HeadWeights:
    """One projection cut into heads: `y[head] = x @ W[head] + b[head]`."""

    W: Float[Tensor, "heads d_in d_out"]
    b: Float[Tensor, "heads d_out"] | None


def query(site: Site) -> HeadWeights:
    return projection(site, "q")


def key(site: Site) -> HeadWeights:
    return projection(site, "k")


def value(site: Site) -> HeadWeights:
    return projection(site, "v")


def output(site: Site) -> tuple[Float[Tensor, "heads d_value d_model"], Float[Tensor, " d_model"] | None]:
    """`sum over heads of z[head] @ W[head]`, plus one bias for all heads together."""
    refuse_odd_heads(site)
    module = site.module.out_proj if isinstance(site.module, nn.MultiheadAttention) else site.out
    if module is None:
        raise HeadwiseError(f"{site.name} ({type(site.module).__name__}): its output projection was not found.")
    weight = matrix(module, f"{site.name}'s output projection")
    return weight.view(len(weight), site.heads, site.value_dim).permute(1, 2, 0), vector(module)


def projection(site: Site, which: str) -> HeadWeights:
    """Query, key or value weights of every head."""
    refuse_odd_heads(site)
    heads = site.heads if which == "q" else site.kv_heads
    width = site.value_dim if which == "v" else site.head_dim
    if isinstance(site.module, nn.MultiheadAttention):
        weight, bias = torch_mha(site.module, which)
    else:
        found = site.projections
        if found is None:
            raise unknown(site)
        module = getattr(found, which)
        if module is None:
            return from_fused(site, found, which)
        weight, bias = matrix(module, f"{site.name}.{which}"), vector(module)
    per_head = len(weight) // heads
    # A query projection twice as wide holds each head's output gate in its second half.
    if len(weight) % heads or not (per_head == width or (which == "q" and per_head == 2 * width)):
        raise unknown(site)
    return HeadWeights(
        weight.view(heads, per_head, -1)[:, :width].transpose(1, 2),
        None if bias is None else bias.view(heads, per_head)[:, :width],
    )


def torch_mha(module: nn.MultiheadAttention, which: str) -> tuple[Tensor, Tensor | None]:
    place = "qkv".index(which)
    if module.in_proj_weight is not None:
        weight = module.in_proj_weight.chunk(3)[place]
    else:
        weight = getattr(module, f"{which}_proj_weight")
    bias = module.in_proj_bias
    return weight, None if bias is None else bias.chunk(3)[place]


def from_fused(site: Site, found: Projections, which: str) -> HeadWeights:
    """One of q, k, v out of a fused projection."""
    order = fused_order(site.module)
    if found.fused is None or order is None:
        raise unknown(site)
    weight = heads_of(matrix(found.fused, f"{site.name}'s fused projection"), site, found, which, order)
    bias = vector(found.fused)
    if bias is not None:
        bias = heads_of(bias, site, found, which, order)
    else:
        # BEiT and its kin keep a query and a value bias beside a fused weight that has none.
        beside = getattr(site.module, f"{which}_bias", None)
        bias = beside.view(len(weight), -1) if isinstance(beside, Tensor) and beside.dim() == 1 else None
    return HeadWeights(weight.transpose(1, 2), bias)


def heads_of(fused: Tensor, site: Site, found: Projections, which: str, order: str) -> Tensor:
    """Cut a fused weight or bias along its first dimension into [head, row of the head, ...]."""
    heads = site.heads if which == "q" else site.kv_heads
    if order == BLOCKS:
        q = 0 if found.q is not None else site.heads * site.head_dim
        k, v = site.kv_heads * site.head_dim, site.kv_heads * site.value_dim
        if len(fused) != q + k + v:
            raise unknown(site)
        start, stop = {"q": (0, q), "k": (q, q + k), "v": (q + k, q + k + v)}[which]
        return fused[start:stop].view(heads, -1, *fused.shape[1:])
    if order == QUARTERS:
        place = {"q": 0, "v": 1, "k": 2}[which]
        return fused.view(4, 3, heads // 4, site.head_dim, *fused.shape[1:])[:, place].flatten(0, 1)
    if len(fused) != site.kv_heads * (site.group + 2) * site.head_dim:
        raise unknown(site)
    cut = fused.view(site.kv_heads, site.group + 2, site.head_dim, *fused.shape[1:])
    if which == "q":
        return cut[:, 0] if site.group == 1 else cut[:, : site.group].flatten(0, 1)
    return cut[:, site.group + "kv".index(which)]


def refuse_odd_heads(site: Site) -> None:
    """Some layers mix their heads between the softmax and the output, so that no row belongs to one head."""
    if type(site.module).__name__ in MIXED:
        raise HeadwiseError(
            f"{site.name} ({type(site.module).__name__}) subtracts heads from each other, so its weights do not belong "
            "to single heads; readings and edits still work."
        )


def unknown(site: Site) -> HeadwiseError:
    return HeadwiseError(
        f"{site.name} ({type(site.module).__name__}): the layout of its projections is not known, so its heads have "
        "no weight views; readings and edits still work."
    )
