"""Softmax attention in Triton for some of the queries of every head, the way a router picked them.

A head's queries are gathered by their numbers, so a head that few tokens picked does little work. Rows of a block lie
apart, so the keys it walks are those its last row sees.
"""

import triton
import triton.language as tl

from headwise.swap.kernels.phase_kernels import NEG, seen_by
from headwise.swap.kernels.sigmoid_portable import product, put, rows

VARYING = ("heads", "queries", "keys", "offset")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(q, ka, va, start, position, keys, sk_k, sv_k, valid_at, scale, m, total, acc, MASK: tl.constexpr,
         CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
         DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    column = start + tl.arange(0, BN)
    k = rows(ka, column, keys, sk_k, D, DP)
    v = rows(va, column, keys, sv_k, DV, DVP)
    s = product(q, tl.trans(k), EXACT) * (scale * LOG2E)
    if MASK:
        valid = column < keys
        if HAS_VALID:
            valid = tl.load(valid_at + column, mask=valid, other=0) != 0
        s = tl.where(seen_by(position, column, keys, valid, CAUSAL, HAS_VALID), s, NEG)
    new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    shrink = tl.exp2(m - new)
    return new, total * shrink + tl.sum(p, 1), acc * shrink[:, None] + product(p.to(v.dtype), v, EXACT)


@triton.jit(do_not_specialize=VARYING)
def routed_forward(Q, K, V, VALID, ORDER, COUNT, OUT, sq_b, sq_h, sq_q, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k,
                   so_b, so_h, so_q, heads, queries, keys, offset, scale, group: tl.constexpr, CAUSAL: tl.constexpr,
                   HAS_VALID: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                   DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """ORDER [batch, heads, query]: the numbers of a head's queries, ascending; COUNT [batch, heads] of them count."""
    lane = tl.program_id(1)
    count = tl.load(COUNT + lane)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if start < count:
        batch = (lane // heads).to(tl.int64)
        head = (lane % heads).to(tl.int64)
        place = start + tl.arange(0, BM)
        there = place < count
        row = tl.load(ORDER + lane.to(tl.int64) * queries + place, mask=there, other=queries)
        q = rows(Q + batch * sq_b + head * sq_h, row, queries, sq_q, D, DP)
        position = row + offset
        ka = K + batch * sk_b + (head // group) * sk_h
        va = V + batch * sv_b + (head // group) * sv_h
        m = tl.full((BM,), -1e20, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, DVP), tl.float32)
        last = keys
        plain = keys // BN * BN
        if CAUSAL:
            last = tl.minimum(keys, tl.max(tl.where(there, position, 0)) + 1)
            plain = tl.minimum(plain, (tl.min(position) + 1) // BN * BN)
        if HAS_VALID:
            plain = 0
        for at in range(0, plain, BN):
            m, total, acc = tile(q, ka, va, at, position, keys, sk_k, sv_k, VALID + batch * keys, scale, m, total, acc,
                                 False, CAUSAL, HAS_VALID, EXACT, D, DP, DV, DVP, BN)  # fmt: skip
        for at in range(plain, last, BN):
            m, total, acc = tile(q, ka, va, at, position, keys, sk_k, sv_k, VALID + batch * keys, scale, m, total, acc,
                                 True, CAUSAL, HAS_VALID, EXACT, D, DP, DV, DVP, BN)  # fmt: skip
        out = acc / tl.maximum(total, 1e-37)[:, None]
        put(OUT + batch * so_b + head * so_h, out, row, queries, so_q, DV, DVP)
