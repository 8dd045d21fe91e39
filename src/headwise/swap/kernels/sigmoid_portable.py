"""Sigmoid attention in plain Triton, for any GPU and the interpreter: forward, gradient of queries, of keys and values.

The formulas stand in `sigmoid_hopper.py`. Keys that are padding weigh 0. float32 is computed as such (tf32x3).
"""

import triton
import triton.language as tl

VARYING = ("heads", "queries", "keys", "offset")


@triton.jit
def product(x, y, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(x, y, input_precision="tf32x3")
    return tl.dot(x, y)


@triton.jit
def weights(s, query, column, keys, valid, scale, b, CAUSAL: tl.constexpr, VALID: tl.constexpr):
    """[query, key]: sigmoid(scale s + b), 0 for keys that are not seen."""
    seen = (column < keys)[None, :]
    if VALID:
        seen = seen & valid[None, :]
    if CAUSAL:
        seen = seen & (column[None, :] <= query[:, None])
    return tl.where(seen, 1.0 / (1.0 + tl.exp(-(s * scale + b))), 0.0)


@triton.jit
def rows(x, row, count, stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows of a [row, dim] matrix, 0 past its end."""
    dim = tl.arange(0, DP)
    at = x + row.to(tl.int64)[:, None] * stride + dim[None, :]
    return tl.load(at, mask=(row < count)[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def put(x, value, row, count, stride, D: tl.constexpr, DP: tl.constexpr):
    dim = tl.arange(0, DP)
    at = x + row.to(tl.int64)[:, None] * stride + dim[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(row < count)[:, None] & (dim < D)[None, :])


@triton.jit(do_not_specialize=VARYING)
def query_side(Q, K, V, DO, VALID, OUT, sq_b, sq_h, sq_q, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, sd_b, sd_h, sd_q,
               so_b, so_h, so_q, heads, queries, keys, offset, scale, b, group: tl.constexpr, CAUSAL: tl.constexpr,
               HAS_VALID: tl.constexpr, BACKWARD: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr,
               DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Block of queries: their output, or with BACKWARD their gradient."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv = head // group
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)
    q = rows(Q + batch * sq_b + head * sq_h, row, queries, sq_q, D, DP)
    position = row + offset
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, tl.max(position) + 1)
    if BACKWARD:
        do = rows(DO + batch * sd_b + head * sd_h, row, queries, sd_q, DV, DVP)
        acc = tl.zeros((BM, DP), tl.float32)
    else:
        acc = tl.zeros((BM, DVP), tl.float32)
    for start in range(0, last, BN):
        column = start + tl.arange(0, BN)
        k = rows(K + batch * sk_b + kv * sk_h, column, keys, sk_k, D, DP)
        v = rows(V + batch * sv_b + kv * sv_h, column, keys, sv_k, DV, DVP)
        valid = column < keys
        if HAS_VALID:
            valid = tl.load(VALID + batch * keys + column, mask=valid, other=0) != 0
        p = weights(product(q, tl.trans(k), EXACT), position, column, keys, valid, scale, b, CAUSAL, HAS_VALID)
        if BACKWARD:
            ds = product(do, tl.trans(v), EXACT) * p * (1 - p)
            acc += product(ds.to(k.dtype), k, EXACT)
        else:
            acc += product(p.to(v.dtype), v, EXACT)
    to = OUT + batch * so_b + head * so_h
    if BACKWARD:
        put(to, acc * scale, row, queries, so_q, D, DP)
    else:
        put(to, acc, row, queries, so_q, DV, DVP)


@triton.jit(do_not_specialize=VARYING)
def key_side(Q, K, V, DO, VALID, DK, DV_, sq_b, sq_h, sq_q, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, sd_b, sd_h, sd_q,
             gk_b, gk_h, gk_k, gv_b, gv_h, gv_k, heads, queries, keys, offset, scale, b, group: tl.constexpr,
             CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
             DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Block of keys: the gradients of keys and values, over all heads that share them."""
    kv_heads = heads // group
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    k = rows(K + batch * sk_b + kv * sk_h, column, keys, sk_k, D, DP)
    v = rows(V + batch * sv_b + kv * sv_h, column, keys, sv_k, DV, DVP)
    valid = column < keys
    if HAS_VALID:
        valid = tl.load(VALID + batch * keys + column, mask=valid, other=0) != 0
    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DVP), tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(tl.program_id(0) * BN - offset, 0) // BM * BM
    for member in range(group):
        head = kv * group + member
        for start in range(first, queries, BM):
            row = start + tl.arange(0, BM)
            q = rows(Q + batch * sq_b + head * sq_h, row, queries, sq_q, D, DP)
            do = rows(DO + batch * sd_b + head * sd_h, row, queries, sd_q, DV, DVP)
            s = product(q, tl.trans(k), EXACT)
            p = weights(s, row + offset, column, keys, valid, scale, b, CAUSAL, HAS_VALID)
            dv += product(tl.trans(p).to(do.dtype), do, EXACT)
            ds = product(do, tl.trans(v), EXACT) * p * (1 - p)
            dk += product(tl.trans(ds).to(q.dtype), q, EXACT)
    put(DK + batch * gk_b + kv * gk_h, dk * scale, column, keys, gk_k, D, DP)
    put(DV_ + batch * gv_b + kv * gv_h, dv, column, keys, gv_k, DV, DVP)
