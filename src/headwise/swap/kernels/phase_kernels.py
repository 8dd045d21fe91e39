"""Token-aware phase attention in Triton: softmax of an amplitude times the cosine of a phase that grows with distance.

    s_ij = a_ij cos(2 pi t_ij),   a_ij = ca qA_i.kA_j,   t_ij = |i-j|^alpha (cp qP_i.kP_j)

Gradients, with ds from the softmax:  da = ds cos(2 pi t),  dt = -2 pi ds a sin(2 pi t).

Powers of distances come from a table, and in tiles far from the diagonal from four terms of their series around the
tile's middle (5e-7 at worst): a load for every score costs more than all the rest. A phase is brought into half a turn
before its cosine is taken.
"""

import triton
import triton.language as tl

from headwise.swap.kernels.sigmoid_portable import product, put, rows

VARYING = ("heads", "queries", "keys", "offset")
TURN = tl.constexpr(6.283185307179586)
LOG2E = tl.constexpr(1.4426950408889634)
NEG = tl.constexpr(-1e30)
FAR = tl.constexpr(768)
"""From this distance on (of a tile's middle; tiles reach 96 keys to both sides) the series is good."""


@triton.jit
def cos_sin(t, FAST: tl.constexpr):
    """Of t turns."""
    x = (t - tl.floor(t + 0.5)) * TURN
    if FAST:
        c = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        s = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        return c, s
    return tl.cos(x), tl.sin(x)


@triton.jit
def seen_by(position, column, keys, valid, CAUSAL: tl.constexpr, VALID: tl.constexpr):
    seen = (column < keys)[None, :]
    if VALID:
        seen = seen & valid[None, :]
    if CAUSAL:
        seen = seen & (column[None, :] <= position[:, None])
    return seen


@triton.jit
def power_of(position, column, first, start, POWER, alpha, seen, SERIES: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr):  # fmt: skip
    """|i - j|^alpha of a tile that begins at position `first` and key `start`."""
    if SERIES:
        middle = (first - start + (BM - BN) // 2).to(tl.float32)
        x = (position[:, None] - column[None, :]).to(tl.float32) * (1 / middle) - 1
        terms = 1 + x * ((alpha - 1) / 2) * (1 + x * ((alpha - 2) / 3) * (1 + x * ((alpha - 3) / 4)))
        return tl.exp2(alpha * tl.log2(middle)) * (1 + x * alpha * terms)
    return tl.load(POWER + tl.abs(position[:, None] - column[None, :]), mask=seen, other=0.0)


@triton.jit
def bounds(first, last_row, keys, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, VALID: tl.constexpr):
    """Keys walked from the left: up to `far` by the series, up to `plain` without a mask, up to `last` with one."""
    last = keys
    plain = keys // BN * BN
    far = 0
    if CAUSAL:
        last = tl.minimum(keys, last_row + 1)
        plain = tl.minimum(plain, (first + 1) // BN * BN)
        far = tl.minimum(plain, tl.maximum(first - FAR + (BM - BN) // 2, 0) // BN * BN)
    if VALID:
        plain = 0
        far = 0
    return far, plain, last


@triton.jit
def query_tile(qa, qp, do, lse, delta, KA, KP, V, POWER, VALID, position, first, start, keys, sk_k, sv_k, ca, cp, alpha,
               m, total, acc, grad_a, grad_p, SERIES: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
               HAS_VALID: tl.constexpr, BACKWARD: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
               DA: tl.constexpr, DAP: tl.constexpr, DP: tl.constexpr, DPP: tl.constexpr, DV: tl.constexpr,
               DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    column = start + tl.arange(0, BN)
    ka = rows(KA, column, keys, sk_k, DA, DAP)
    kp = rows(KP, column, keys, sk_k, DP, DPP)
    v = rows(V, column, keys, sv_k, DV, DVP)
    valid = column < keys
    if HAS_VALID:
        valid = tl.load(VALID + column, mask=valid, other=0) != 0
    seen = seen_by(position, column, keys, valid, CAUSAL and MASK, HAS_VALID)
    power = power_of(position, column, first, start, POWER, alpha, seen, SERIES, BM, BN)
    amplitude = product(qa, tl.trans(ka), EXACT) * ca
    cos, sin = cos_sin(product(qp, tl.trans(kp), EXACT) * (power * cp), FAST)
    s = amplitude * cos * LOG2E
    if MASK:
        s = tl.where(seen, s, NEG)
    if BACKWARD:
        p = tl.exp2(s - lse[:, None])
        ds = p * (product(do, tl.trans(v), EXACT) - delta[:, None])
        grad_a += product((ds * cos * ca).to(ka.dtype), ka, EXACT)
        grad_p += product((ds * amplitude * sin * power * (-TURN * cp)).to(kp.dtype), kp, EXACT)
    else:
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(m - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + product(p.to(v.dtype), v, EXACT)
        m = new
    return m, total, acc, grad_a, grad_p


@triton.jit(do_not_specialize=VARYING)
def phase_queries(QA, QP, KA, KP, V, DO, DELTA, LSE, POWER, VALID, OUT, OUT_P,
                  sq_b, sq_h, sq_q, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, sd_b, sd_h, sd_q, so_b, so_h, so_q,
                  heads, queries, keys, offset, ca, cp, alpha, group: tl.constexpr, CAUSAL: tl.constexpr,
                  HAS_VALID: tl.constexpr, BACKWARD: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
                  DA: tl.constexpr, DAP: tl.constexpr, DP: tl.constexpr, DPP: tl.constexpr, DV: tl.constexpr,
                  DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Block of queries: output and log-sum-exp (base 2), or with BACKWARD the gradients of both parts of them."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv = head // group
    row_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    row = row_start + tl.arange(0, BM)
    there = row < queries
    position = row + offset
    first = row_start + offset
    at = batch * sq_b + head * sq_h
    qa = rows(QA + at, row, queries, sq_q, DA, DAP)
    qp = rows(QP + at, row, queries, sq_q, DP, DPP)
    stat = (batch * heads + head) * queries + row
    do = qa
    lse = tl.zeros((BM,), tl.float32)
    delta = lse
    if BACKWARD:
        do = rows(DO + batch * sd_b + head * sd_h, row, queries, sd_q, DV, DVP)
        lse = tl.load(LSE + stat, mask=there, other=0.0)
        delta = tl.load(DELTA + stat, mask=there, other=0.0)
    acc = tl.zeros((BM, 16 if BACKWARD else DVP), tl.float32)
    grad_a = tl.zeros((BM, DAP if BACKWARD else 16), tl.float32)
    grad_p = tl.zeros((BM, DPP if BACKWARD else 16), tl.float32)
    m = tl.full((BM,), -1e20, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    KA += batch * sk_b + kv * sk_h
    KP += batch * sk_b + kv * sk_h
    V += batch * sv_b + kv * sv_h
    VALID += batch * keys
    far, plain, last = bounds(first, tl.max(tl.where(there, position, 0)), keys, BM, BN, CAUSAL, HAS_VALID)
    for start in range(0, far, BN):
        m, total, acc, grad_a, grad_p = query_tile(
            qa, qp, do, lse, delta, KA, KP, V, POWER, VALID, position, first, start, keys, sk_k, sv_k, ca, cp, alpha,
            m, total, acc, grad_a, grad_p, True, False, CAUSAL, HAS_VALID, BACKWARD, EXACT, FAST, DA, DAP, DP, DPP, DV,
            DVP, BM, BN)  # fmt: skip
    for start in range(far, plain, BN):
        m, total, acc, grad_a, grad_p = query_tile(
            qa, qp, do, lse, delta, KA, KP, V, POWER, VALID, position, first, start, keys, sk_k, sv_k, ca, cp, alpha,
            m, total, acc, grad_a, grad_p, False, False, CAUSAL, HAS_VALID, BACKWARD, EXACT, FAST, DA, DAP, DP, DPP, DV,
            DVP, BM, BN)  # fmt: skip
    for start in range(plain, last, BN):
        m, total, acc, grad_a, grad_p = query_tile(
            qa, qp, do, lse, delta, KA, KP, V, POWER, VALID, position, first, start, keys, sk_k, sv_k, ca, cp, alpha,
            m, total, acc, grad_a, grad_p, False, True, CAUSAL, HAS_VALID, BACKWARD, EXACT, FAST, DA, DAP, DP, DPP, DV,
            DVP, BM, BN)  # fmt: skip
    to = batch * so_b + head * so_h
    if BACKWARD:
        put(OUT + to, grad_a, row, queries, so_q, DA, DAP)
        put(OUT_P + to, grad_p, row, queries, so_q, DP, DPP)
    else:
        put(OUT + to, acc / tl.maximum(total, 1e-37)[:, None], row, queries, so_q, DV, DVP)
        tl.store(LSE + stat, tl.where(total > 0, m + tl.log2(total), 0.0), mask=there)


@triton.jit
def key_tile(ka, kp, v, QA, QP, DO, DELTA, LSE, POWER, valid, column, first_key, start, queries, keys, offset, sq_q,
             sd_q, ca, cp, alpha, dka, dkp, dv, SERIES: tl.constexpr, CAUSAL: tl.constexpr,
             HAS_VALID: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr, DA: tl.constexpr, DAP: tl.constexpr,
             DP: tl.constexpr, DPP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr):  # fmt: skip
    row = start + tl.arange(0, BM)
    there = row < queries
    position = row + offset
    qa = rows(QA, row, queries, sq_q, DA, DAP)
    qp = rows(QP, row, queries, sq_q, DP, DPP)
    do = rows(DO, row, queries, sd_q, DV, DVP)
    lse = tl.load(LSE + row, mask=there, other=0.0)
    delta = tl.load(DELTA + row, mask=there, other=0.0)
    seen = seen_by(position, column, keys, valid, CAUSAL and not SERIES, HAS_VALID) & there[:, None]
    power = power_of(position, column, start + offset, first_key, POWER, alpha, seen, SERIES, BM, BN)
    amplitude = product(qa, tl.trans(ka), EXACT) * ca
    cos, sin = cos_sin(product(qp, tl.trans(kp), EXACT) * (power * cp), FAST)
    p = tl.where(seen, tl.exp2(amplitude * cos * LOG2E - lse[:, None]), 0.0)
    dv += product(tl.trans(p).to(do.dtype), do, EXACT)
    ds = p * (product(do, tl.trans(v), EXACT) - delta[:, None])
    dka += product(tl.trans(ds * cos * ca).to(qa.dtype), qa, EXACT)
    dkp += product(tl.trans(ds * amplitude * sin * power * (-TURN * cp)).to(qp.dtype), qp, EXACT)
    return dka, dkp, dv


@triton.jit(do_not_specialize=VARYING)
def phase_keys(QA, QP, KA, KP, V, DO, DELTA, LSE, POWER, VALID, DKA, DKP, DV_,
               sq_b, sq_h, sq_q, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, sd_b, sd_h, sd_q,
               gk_b, gk_h, gk_k, gv_b, gv_h, gv_k, heads, queries, keys, offset, ca, cp, alpha, group: tl.constexpr,
               CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
               DA: tl.constexpr, DAP: tl.constexpr, DP: tl.constexpr, DPP: tl.constexpr, DV: tl.constexpr,
               DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Block of keys: the gradients of both parts of the keys and of the values, over all heads that share them."""
    kv_heads = heads // group
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    first_key = tl.program_id(0) * BN
    column = first_key + tl.arange(0, BN)
    k_at = batch * sk_b + kv * sk_h
    ka = rows(KA + k_at, column, keys, sk_k, DA, DAP)
    kp = rows(KP + k_at, column, keys, sk_k, DP, DPP)
    v = rows(V + batch * sv_b + kv * sv_h, column, keys, sv_k, DV, DVP)
    valid = column < keys
    if HAS_VALID:
        valid = tl.load(VALID + batch * keys + column, mask=valid, other=0) != 0
    dka = tl.zeros((BN, DAP), tl.float32)
    dkp = tl.zeros((BN, DPP), tl.float32)
    dv = tl.zeros((BN, DVP), tl.float32)
    # Queries from the first that sees a key on; those far off by the series.
    first = 0
    far = queries
    if CAUSAL:
        first = tl.maximum(first_key - offset, 0) // BM * BM
        if not HAS_VALID:
            far = tl.cdiv(tl.maximum(first_key - offset + FAR + (BN - BM) // 2, 0), BM) * BM
            far = tl.maximum(first, tl.minimum(far, queries))
    for member in range(group):
        head = kv * group + member
        qa_at = QA + batch * sq_b + head * sq_h
        qp_at = QP + batch * sq_b + head * sq_h
        do_at = DO + batch * sd_b + head * sd_h
        stat = (batch * heads + head) * queries
        for start in range(first, far, BM):
            dka, dkp, dv = key_tile(
                ka, kp, v, qa_at, qp_at, do_at, DELTA + stat, LSE + stat, POWER, valid, column, first_key, start,
                queries, keys, offset, sq_q, sd_q, ca, cp, alpha, dka, dkp, dv, False, CAUSAL, HAS_VALID, EXACT,
                FAST, DA, DAP, DP, DPP, DV, DVP, BM, BN)  # fmt: skip
        for start in range(far, queries, BM):
            dka, dkp, dv = key_tile(
                ka, kp, v, qa_at, qp_at, do_at, DELTA + stat, LSE + stat, POWER, valid, column, first_key, start,
                queries, keys, offset, sq_q, sd_q, ca, cp, alpha, dka, dkp, dv, True, CAUSAL, HAS_VALID, EXACT,
                FAST, DA, DAP, DP, DPP, DV, DVP, BM, BN)  # fmt: skip
    to = batch * gk_b + kv * gk_h
    put(DKA + to, dka, column, keys, gk_k, DA, DAP)
    put(DKP + to, dkp, column, keys, gk_k, DP, DPP)
    put(DV_ + batch * gv_b + kv * gv_h, dv, column, keys, gv_k, DV, DVP)
