"""Token-aware phase attention in Triton: softmax of an amplitude times the cosine of a phase that grows with distance.

    s_ij = a_ij cos(2 pi t_ij),   a_ij = ca qA_i.kA_j,   t_ij = |i-j|^alpha (cp qP_i.kP_j)

Gradients, with ds from the softmax:  da = ds cos(2 pi t),  dt = -2 pi ds a sin(2 pi t).
The powers of distances come from a table; a phase is brought into half a turn before its cosine is taken.
"""

import triton
import triton.language as tl

from headwise.swap.kernels.sigmoid_portable import product, put, rows

VARYING = ("heads", "queries", "keys", "offset")
TURN = tl.constexpr(6.283185307179586)
NEG = tl.constexpr(-1e30)


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


@triton.jit(do_not_specialize=VARYING)
def phase_queries(QA, QP, KA, KP, V, DO, DELTA, LSE, POWER, VALID, OUT, OUT_P,
                  sq_b, sq_h, sq_q, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, sd_b, sd_h, sd_q, so_b, so_h, so_q,
                  heads, queries, keys, offset, ca, cp, group: tl.constexpr, CAUSAL: tl.constexpr,
                  HAS_VALID: tl.constexpr, BACKWARD: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
                  DA: tl.constexpr, DAP: tl.constexpr, DP: tl.constexpr, DPP: tl.constexpr, DV: tl.constexpr,
                  DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Block of queries: output and log-sum-exp, or with BACKWARD the gradients of both parts of the queries."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv = head // group
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)
    there = row < queries
    position = row + offset
    at = batch * sq_b + head * sq_h
    qa = rows(QA + at, row, queries, sq_q, DA, DAP)
    qp = rows(QP + at, row, queries, sq_q, DP, DPP)
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, tl.max(tl.where(there, position, 0)) + 1)
    stat = (batch * heads + head) * queries + row
    if BACKWARD:
        do = rows(DO + batch * sd_b + head * sd_h, row, queries, sd_q, DV, DVP)
        lse = tl.load(LSE + stat, mask=there, other=0.0)
        delta = tl.load(DELTA + stat, mask=there, other=0.0)
        grad_a = tl.zeros((BM, DAP), tl.float32)
        grad_p = tl.zeros((BM, DPP), tl.float32)
    else:
        acc = tl.zeros((BM, DVP), tl.float32)
        m = tl.full((BM,), -1e20, tl.float32)
        total = tl.zeros((BM,), tl.float32)
    k_at = batch * sk_b + kv * sk_h
    for start in range(0, last, BN):
        column = start + tl.arange(0, BN)
        ka = rows(KA + k_at, column, keys, sk_k, DA, DAP)
        kp = rows(KP + k_at, column, keys, sk_k, DP, DPP)
        v = rows(V + batch * sv_b + kv * sv_h, column, keys, sv_k, DV, DVP)
        valid = column < keys
        if HAS_VALID:
            valid = tl.load(VALID + batch * keys + column, mask=valid, other=0) != 0
        seen = seen_by(position, column, keys, valid, CAUSAL, HAS_VALID)
        power = tl.load(POWER + tl.abs(position[:, None] - column[None, :]), mask=seen, other=0.0)
        amplitude = product(qa, tl.trans(ka), EXACT) * ca
        cos, sin = cos_sin(product(qp, tl.trans(kp), EXACT) * (power * cp), FAST)
        s = tl.where(seen, amplitude * cos, NEG)
        if BACKWARD:
            p = tl.exp(s - lse[:, None])
            ds = p * (product(do, tl.trans(v), EXACT) - delta[:, None])
            grad_a += product((ds * cos * ca).to(ka.dtype), ka, EXACT)
            grad_p += product((ds * amplitude * sin * power * (-TURN * cp)).to(kp.dtype), kp, EXACT)
        else:
            new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp(s - new[:, None])
            shrink = tl.exp(m - new)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + product(p.to(v.dtype), v, EXACT)
            m = new
    to = batch * so_b + head * so_h
    if BACKWARD:
        put(OUT + to, grad_a, row, queries, so_q, DA, DAP)
        put(OUT_P + to, grad_p, row, queries, so_q, DP, DPP)
    else:
        put(OUT + to, acc / tl.maximum(total, 1e-37)[:, None], row, queries, so_q, DV, DVP)
        tl.store(LSE + stat, tl.where(total > 0, m + tl.log(total), 0.0), mask=there)


@triton.jit(do_not_specialize=VARYING)
def phase_keys(QA, QP, KA, KP, V, DO, DELTA, LSE, POWER, VALID, DKA, DKP, DV_,
               sq_b, sq_h, sq_q, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, sd_b, sd_h, sd_q,
               gk_b, gk_h, gk_k, gv_b, gv_h, gv_k, heads, queries, keys, offset, ca, cp, group: tl.constexpr,
               CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
               DA: tl.constexpr, DAP: tl.constexpr, DP: tl.constexpr, DPP: tl.constexpr, DV: tl.constexpr,
               DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Block of keys: the gradients of both parts of the keys and of the values, over all heads that share them."""
    kv_heads = heads // group
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
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
    first = 0
    if CAUSAL:
        first = tl.maximum(tl.program_id(0) * BN - offset, 0) // BM * BM
    for member in range(group):
        head = kv * group + member
        for start in range(first, queries, BM):
            row = start + tl.arange(0, BM)
            there = row < queries
            position = row + offset
            at = batch * sq_b + head * sq_h
            qa = rows(QA + at, row, queries, sq_q, DA, DAP)
            qp = rows(QP + at, row, queries, sq_q, DP, DPP)
            do = rows(DO + batch * sd_b + head * sd_h, row, queries, sd_q, DV, DVP)
            stat = (batch * heads + head) * queries + row
            lse = tl.load(LSE + stat, mask=there, other=0.0)
            delta = tl.load(DELTA + stat, mask=there, other=0.0)
            seen = seen_by(position, column, keys, valid, CAUSAL, HAS_VALID) & there[:, None]
            power = tl.load(POWER + tl.abs(position[:, None] - column[None, :]), mask=seen, other=0.0)
            amplitude = product(qa, tl.trans(ka), EXACT) * ca
            cos, sin = cos_sin(product(qp, tl.trans(kp), EXACT) * (power * cp), FAST)
            p = tl.where(seen, tl.exp(amplitude * cos - lse[:, None]), 0.0)
            dv += product(tl.trans(p).to(do.dtype), do, EXACT)
            ds = p * (product(do, tl.trans(v), EXACT) - delta[:, None])
            dka += product(tl.trans(ds * cos * ca).to(qa.dtype), qa, EXACT)
            dkp += product(tl.trans(ds * amplitude * sin * power * (-TURN * cp)).to(qp.dtype), qp, EXACT)
    to = batch * gk_b + kv * gk_h
    put(DKA + to, dka, column, keys, gk_k, DA, DAP)
    put(DKP + to, dkp, column, keys, gk_k, DP, DPP)
    put(DV_ + batch * gv_b + kv * gv_h, dv, column, keys, gv_k, DV, DVP)
