"""Put partial attentions over disjoint keys together: exact, from their log-sum-exps alone.

With `w_s = exp(lse_s - lse)` the whole is `out = sum w_s out_s`, and likewise masses and moments of distance; the
entropy is `sum w_s (H_s - log w_s)`. Reweight multiplies `w_s` by a factor and leaves everything else as it is.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=("rows", "parts", "outer", "heads", "queries", "G"))
def merge_kernel(OUT, LSE, ENTROPY, MASS, INNER, DISTANCE, DISTANCE_SQ, TOP, TOP_INDEX, FACTOR, SINKS,
                 OUT_, LSE_, ENTROPY_, MASS_, INNER_, DISTANCE_, DISTANCE_SQ_, TOP_, TOP_INDEX_,
                 rows, parts, outer, heads, queries, G,
                 W_OUT: tl.constexpr, W_MASS: tl.constexpr, W_ENTROPY: tl.constexpr, W_INNER: tl.constexpr,
                 W_DISTANCE: tl.constexpr, W_TOP: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SINKS: tl.constexpr,
                 DV: tl.constexpr, DVP: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr):  # fmt: skip
    """One row; parts are numbered part * outer + group, and each group is merged by itself."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    part = tl.arange(0, SP)
    there = part < parts
    at = (part * outer + group).to(tl.int64) * rows + row
    log = tl.load(LSE + at, mask=there, other=float("-inf")) * LOG2E
    top = tl.maximum(tl.max(log, 0), -1e20)
    if HAS_SINKS:
        sink = tl.load(SINKS + (row // queries) % heads) * LOG2E
        top = tl.maximum(top, sink)
        total = tl.sum(tl.exp2(log - top), 0) + tl.exp2(sink - top)
    else:
        total = tl.sum(tl.exp2(log - top), 0)
    whole = top + tl.log2(total)
    w = tl.where(total > 0, tl.exp2(log - top) / tl.where(total > 0, total, 1.0), 0.0)
    if HAS_FACTOR:
        w = w * tl.load(FACTOR + row * parts + part, mask=there, other=0.0)
    to = group.to(tl.int64) * rows + row
    tl.store(LSE_ + to, whole * LN2)
    log_w = tl.log2(tl.where(w > 0, w, 1.0)) * LN2
    if W_OUT:
        v = tl.arange(0, DVP)
        o = tl.load(OUT + at[:, None] * DV + v[None, :], mask=there[:, None] & (v < DV)[None, :], other=0.0)
        tl.store(OUT_ + to * DV + v, tl.sum(o * w[:, None], 0).to(OUT_.dtype.element_ty), mask=v < DV)
    if W_ENTROPY:
        h = tl.load(ENTROPY + at, mask=there, other=0.0)
        tl.store(ENTROPY_ + to, tl.sum(w * (h - log_w), 0))
    if W_DISTANCE:
        tl.store(DISTANCE_ + to, tl.sum(w * tl.load(DISTANCE + at, mask=there, other=0.0), 0))
        tl.store(DISTANCE_SQ_ + to, tl.sum(w * tl.load(DISTANCE_SQ + at, mask=there, other=0.0), 0))
    if W_TOP:
        value, spot = tl.max(w * tl.load(TOP + at, mask=there, other=0.0), 0, return_indices=True)
        index = tl.load(TOP_INDEX + (spot * outer + group).to(tl.int64) * rows + row)
        tl.store(TOP_ + to, value)
        tl.store(TOP_INDEX_ + to, tl.where(value > 0, index, -1))
    if W_MASS:
        slot = tl.arange(0, GP)
        wide = there[:, None] & (slot < G)[None, :]
        part_mass = w[:, None] * tl.load(MASS + at[:, None] * G + slot[None, :], mask=wide, other=0.0)
        mass = tl.sum(part_mass, 0)
        tl.store(MASS_ + to * G + slot, mass, mask=slot < G)
        if W_INNER:
            u = part_mass / tl.where(mass > 0, mass, 1.0)[None, :]
            h = tl.load(INNER + at[:, None] * G + slot[None, :], mask=wide, other=0.0)
            inner = tl.sum(u * (h - tl.log2(tl.where(u > 0, u, 1.0)) * LN2), 0)
            tl.store(INNER_ + to * G + slot, inner, mask=slot < G)


@triton.jit(do_not_specialize=("count", "segments"))
def finish_kernel(MASS, LSE, count, segments, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    lse = tl.load(LSE + at // segments, mask=here, other=0.0)
    log = tl.load(MASS + at, mask=here, other=0.0)
    tl.store(MASS + at, tl.where(lse > -1e20, tl.exp2(log - lse * LOG2E), 0.0), mask=here)


def finish_masses(mass: Float[Tensor, "batch heads query segment"], lse: Float[Tensor, "batch heads query"]) -> None:
    """Base-2 logs of unnormalised sums become shares, in place."""
    block = 1024
    finish_kernel[(triton.cdiv(mass.numel(), block),)](mass, lse, mass.numel(), mass.shape[-1], BLOCK=block)


STATISTICS = ("entropy", "mass", "segment_entropy", "distance", "distance_sq", "top_value", "top_index")


def merge(
    found: dict[str, Tensor],
    shape: tuple[int, int, int],
    parts: int,
    outer: int,
    dtype: torch.dtype,
    factor: Float[Tensor, "batch heads query part"] | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> dict[str, Tensor]:
    """Merge `parts` of each of `outer` groups; found holds [parts * outer, batch, heads, query, ...] tensors."""
    rows = shape[0] * shape[1] * shape[2]
    merged = {}
    for name, x in found.items():
        merged[name] = torch.empty(outer, *x.shape[1:], dtype=dtype if name == "out" else x.dtype, device=x.device)
    nothing = found["lse"]

    def pair(name):
        return found.get(name, nothing), merged.get(name, nothing)

    order = ("out", "lse", *STATISTICS)
    before, after = zip(*(pair(name) for name in order), strict=True)
    value_dim = found["out"].shape[-1] if "out" in found else 1
    segments = found["mass"].shape[-1] if "mass" in found else 1
    merge_kernel[(rows, outer)](
        *before, factor if factor is not None else nothing, sinks if sinks is not None else nothing, *after,
        rows, parts, outer, shape[1], shape[2], segments,
        W_OUT="out" in found, W_MASS="mass" in found, W_ENTROPY="entropy" in found,
        W_INNER="segment_entropy" in found, W_DISTANCE="distance" in found, W_TOP="top_value" in found,
        HAS_FACTOR=factor is not None, HAS_SINKS=sinks is not None,
        DV=value_dim, DVP=triton.next_power_of_2(value_dim), GP=triton.next_power_of_2(segments),
        SP=max(2, triton.next_power_of_2(parts)), num_warps=4,
    )  # fmt: skip
    return merged
