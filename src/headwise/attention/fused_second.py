"""What needs the finished normaliser: the weight every key receives, and masses of keys near the query.

Received walks the queries for a block of keys, with p = exp(s - lse) and no running maximum. A band of lags, or the
first key, is a small attention of its own: its share of the whole is exp(its log-sum-exp - the whole's).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.attention.fused import portable
from headwise.attention.fused_kernels import LOG2E, OUT_OF_REACH, VARYING, lookup_bias, raw_scores, split_dot, visible
from headwise.attention.fused_types import FusedCall

LOG2E_HOST = 1.4426950408889634


@triton.jit(do_not_specialize=[n for n in VARYING if n not in ("stretch", "groups", "tile_stride")])
def received_kernel(Q, K, LSE, OUT, POSITION, VALID, LABELS, QUERY_LABELS, BIAS, KEY_BIAS,
                    sq_b, sq_h, sq_q, sk_b, sk_h, sk_k,
                    label_stride, query_label_stride, bias_stride_h, bias_stride_q, key_bias_stride,
                    heads, queries, keys, offset, left, right, scale, cap, G,
                    group: tl.constexpr, POSITIONS: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr,
                    HAS_VALID: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
                    EXACT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Column sums of one block of BN keys of one head, over all queries."""
    lane = tl.program_id(1)
    batch = (lane // heads).to(tl.int64)
    head = lane % heads
    first = tl.program_id(0) * BN
    column = first + tl.arange(0, BN)
    inside = column < keys
    dim = tl.arange(0, DP)
    kind = tl.float32 if EXACT else tl.float16
    k_at = K + batch * sk_b + (head // group).to(tl.int64) * sk_h + column.to(tl.int64)[:, None] * sk_k + dim[None, :]
    k = tl.load(k_at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
    valid = inside
    if HAS_VALID:
        valid = tl.load(VALID + batch * keys + column, mask=inside, other=0) != 0
    if HAS_BIAS:
        label = tl.load(LABELS + batch * label_stride + column, mask=inside, other=-1).to(tl.int32)
        onehot = (label[:, None] == tl.arange(0, GP)[None, :]).to(tl.float32).to(kind)
    if HAS_KEY_BIAS:
        step = tl.load(KEY_BIAS + head * key_bias_stride + column, mask=inside, other=0.0) * LOG2E
    total = tl.zeros([BN], tl.float32)
    begin = first * 0
    end = begin + queries
    if not POSITIONS:
        if HAS_RIGHT:
            begin = tl.maximum(first - right - offset, 0) // BM * BM
        if HAS_LEFT:
            end = tl.minimum(end, first + BN + left - offset)
    for start in range(begin, end, BM):
        row = start + tl.arange(0, BM)
        there = row < queries
        position = row + offset
        if POSITIONS:
            position = tl.load(POSITION + row, mask=there, other=0)
        q_at = Q + batch * sq_b + head.to(tl.int64) * sq_h + row.to(tl.int64)[:, None] * sq_q + dim[None, :]
        q = tl.load(q_at, mask=there[:, None] & (dim < D)[None, :], other=0.0)
        lse = tl.load(LSE + lane.to(tl.int64) * queries + row, mask=there, other=float("inf"))
        lse = tl.where(lse > -1e20, lse * LOG2E, float("inf"))
        # Keys are the rows of the tile, so the sum over queries stays within a thread's row.
        s = raw_scores(k, q, scale, cap, SOFTCAP, EXACT)
        if HAS_BIAS:
            query_label = tl.load(QUERY_LABELS + batch * query_label_stride + row, mask=there, other=0)
            table = lookup_bias(BIAS, row * 0 + head, query_label, G, GP, bias_stride_h, bias_stride_q)
            s += tl.trans(split_dot(table, tl.trans(onehot), tl.zeros([BM, BN], tl.float32), EXACT))
            s = tl.where(s < OUT_OF_REACH / 2, float("-inf"), s)
        if HAS_KEY_BIAS:
            s += step[:, None]
        seen = visible(column, position, keys, valid, left, right, HAS_RIGHT, HAS_LEFT, HAS_VALID)
        p = tl.exp2(s - lse[None, :])
        total += tl.sum(tl.where(tl.trans(seen) & there[None, :], p, 0.0), 1)
    tl.store(OUT + lane.to(tl.int64) * keys + column, total, mask=inside)


def received(
    call: FusedCall,
    lse: Float[Tensor, "batch heads query"],
    query_valid: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch heads key"]:
    """Sum over (valid) queries of the weight each key gets, from the known log-sum-exp."""
    q, k = call.q, call.k
    batch, heads, queries, dim = q.shape
    keys, (left, right) = k.shape[2], call.bounds
    if query_valid is not None:
        lse = lse.masked_fill(~query_valid[:, None], float("-inf"))
    lse = lse.float().contiguous()
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    exact = q.dtype == torch.float32
    small = exact or dim > 128
    sizes = {"BM": 32, "BN": 32, "num_warps": 4} if small else {"BM": 64, "BN": 128, "num_warps": 8}
    table = call.bias_table.float() * LOG2E_HOST if call.bias_table is not None else lse

    def given(x, dtype):
        return lse if x is None else x.to(dtype).contiguous()

    def step(x):
        return 0 if x is None or x.shape[0] == 1 else x.stride(0)

    received_kernel[(triton.cdiv(keys, sizes["BN"]), batch * heads)](
        q, k, lse, out, given(call.positions, torch.int32), given(call.key_valid, torch.uint8),
        given(call.key_labels, torch.int32), given(call.query_labels, torch.int32), table,
        given(call.key_bias, torch.float32), *q.stride()[:3], *k.stride()[:3], step(call.key_labels),
        step(call.query_labels), table.stride(0), table.stride(1), step(call.key_bias), heads, queries, keys,
        call.query_offset, left or 0, right or 0, call.scale if call.softcap is not None else call.scale * LOG2E_HOST,
        call.softcap or 1.0, max(call.segments, 1), group=call.group, POSITIONS=call.positions is not None,
        HAS_RIGHT=right is not None, HAS_LEFT=left is not None, HAS_VALID=call.key_valid is not None,
        SOFTCAP=call.softcap is not None, HAS_BIAS=call.bias_table is not None,
        HAS_KEY_BIAS=call.key_bias is not None, EXACT=exact, D=dim, DP=max(16, triton.next_power_of_2(dim)),
        GP=max(16, triton.next_power_of_2(max(call.segments, 1))), num_stages=2, **sizes,
    )  # fmt: skip
    return out


def band_mass(
    call: FusedCall, low: int, high: int, lse: Float[Tensor, "batch heads query"]
) -> Float[Tensor, "batch heads query"]:
    """The weight on keys with low <= i - j <= high."""
    left, right = call.bounds
    left = high if left is None else min(left, high)
    right = -low if right is None else min(right, -low)
    return share(replace(call, causal=False, window=(left, right)), lse)


def first_mass(call: FusedCall, lse: Float[Tensor, "batch heads query"]) -> Float[Tensor, "batch heads query"]:
    """The weight on key column 0."""

    def cut(x):
        return None if x is None else x[..., :1].contiguous()

    part = replace(call, k=call.k[:, :, :1], key_valid=cut(call.key_valid), key_labels=cut(call.key_labels),
                   key_bias=cut(call.key_bias))  # fmt: skip
    return share(part, lse)


def share(part: FusedCall, lse: Float[Tensor, "batch heads query"]) -> Float[Tensor, "batch heads query"]:
    """The weight of some keys, by a pass over them without values."""
    own = portable(replace(part, v=None, sinks=None, want=frozenset()))["lse"][0]
    return torch.exp(own - lse).nan_to_num(0.0)
