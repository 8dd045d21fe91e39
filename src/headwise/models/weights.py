"""The per-head views of an attention layer's weights, in the convention `x @ W`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.projections import BLOCKS, fused_order, matrix, vector

if TYPE_CHECKING:
    from headwise.models.anatomy import Site


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
    module = site.module.out_proj if isinstance(site.module, nn.MultiheadAttention) else site.out
    if module is None:
        raise HeadwiseError(f"{site.name} ({type(site.module).__name__}): its output projection was not found.")
    weight = matrix(module, f"{site.name}'s output projection")
    return weight.view(len(weight), site.heads, site.value_dim).permute(1, 2, 0), vector(module)


def projection(site: Site, which: str) -> HeadWeights:
    """Query, key or value weights of every head."""
    heads, width = (site.heads, site.head_dim) if which == "q" else (site.kv_heads, site.head_dim)
    if which == "v":
        width = site.value_dim
    if isinstance(site.module, nn.MultiheadAttention):
        weight, bias = torch_mha(site.module, which)
    else:
        found = site.projections
        if found is None:
            raise unknown(site)
        module = getattr(found, which)
        if module is None:
            weight, bias = from_fused(site, which)
        else:
            weight, bias = matrix(module, f"{site.name}.{which}"), vector(module)
    per_head = len(weight) // heads
    if len(weight) % heads or per_head not in (width, 2 * width) or (per_head != width and which != "q"):
        raise unknown(site)
    # A query projection twice as wide holds each head's output gate in its second half.
    cut = weight.view(heads, per_head, weight.shape[1])[:, :width].transpose(1, 2)
    return HeadWeights(cut, None if bias is None else bias.view(heads, per_head)[:, :width])


def torch_mha(module: nn.MultiheadAttention, which: str) -> tuple[Tensor, Tensor | None]:
    place = "qkv".index(which)
    if module.in_proj_weight is not None:
        weight = module.in_proj_weight.chunk(3)[place]
    else:
        weight = getattr(module, f"{which}_proj_weight")
    bias = module.in_proj_bias
    return weight, None if bias is None else bias.chunk(3)[place]


def from_fused(site: Site, which: str) -> tuple[Tensor, Tensor | None]:
    """The rows of one of q, k, v in a fused projection, heads in order."""
    module = site.projections.fused  # type: ignore[union-attr]
    order = fused_order(site.module)
    if module is None or order is None:
        raise unknown(site)
    weight = matrix(module, f"{site.name}'s fused projection")
    bias = vector(module)
    if bias is None:
        bias = separate_biases(site, which)
        return rows(weight, site, which, order), bias
    return rows(weight, site, which, order), rows(bias, site, which, order)


def rows(fused: Tensor, site: Site, which: str, order: str) -> Tensor:
    """Cut a fused weight or bias along its first dimension."""
    q, k, v = site.heads * site.head_dim, site.kv_heads * site.head_dim, site.kv_heads * site.value_dim
    if order == BLOCKS:
        if site.projections.q is not None:  # type: ignore[union-attr]
            q = 0
        if len(fused) != q + k + v:
            raise unknown(site)
        start, stop = {"q": (0, q), "k": (q, q + k), "v": (q + k, q + k + v)}[which]
        return fused[start:stop]
    group = site.heads // site.kv_heads
    if len(fused) != site.kv_heads * (group + 2) * site.head_dim:
        raise unknown(site)
    cut = fused.view(site.kv_heads, group + 2, site.head_dim, *fused.shape[1:])
    part = {"q": cut[:, :group], "k": cut[:, group : group + 1], "v": cut[:, group + 1 :]}[which]
    return part.flatten(0, 2)


def separate_biases(site: Site, which: str) -> Tensor | None:
    """BEiT and its kin keep a query and a value bias beside a fused weight without one."""
    bias = getattr(site.module, f"{which}_bias", None)
    return bias if isinstance(bias, Tensor) and bias.dim() == 1 else None


def unknown(site: Site) -> HeadwiseError:
    return HeadwiseError(
        f"{site.name} ({type(site.module).__name__}): the layout of its projections is not known, so its heads have "
        "no weight views; readings and edits still work."
    )
