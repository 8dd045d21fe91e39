"""Kernels of a decoding step: one query a sample and head against a long cache; score biases, Reweight and HeadGain.

`step_split` attends stretches of the keys. Its rows are the heads that share a key-value head, times the groups of
Reweight and one more for the keys of no group: 16 rows are the least the tensor cores take, so the groups cost nothing.
The program that is done last puts the stretches' log-sum-exps together to the groups' masses, for Reweight's rule.
`step_merge` puts the stretches' outputs together. Every launch costs the host as much as five lines of Python, and the
host is what decoding waits for. Arguments that change from launch to launch come first.
"""

import triton
import triton.language as tl

from headwise.attention.fused_kernels import LOG2E, NEG, START, raw_scores

# Strides come in units of this many entries: so the compiler knows that rows of keys begin at multiples of 16 bytes.
UNIT = tl.constexpr(8)
SPLIT_NUMBERS = ("sq_b", "sq_h", "sk_b", "sk_h", "sk_k", "sv_b", "sv_h", "sv_k", "keys", "position", "j0", "left",
                 "right", "chosen", "label_stride", "bias_h", "bias_q")  # fmt: skip
MERGE_NUMBERS = ("splits", "query_at", "chosen", "label_stride", "segments", "weighed_label")


@triton.jit
def put_together(LSE, SINKS, row, head, count, HAS_SINKS: tl.constexpr, SP: tl.constexpr):
    """Base-2 log-sum-exps of some rows' stretches and groups [row, SP], and of all of a row with its sink [row]."""
    place = tl.arange(0, SP)[None, :]
    # Past the cache of this multiprocessor: other ones may have written them in this launch.
    log = tl.load(LSE + row[:, None] * count + place, mask=place < count, other=float("-inf"), cache_modifier=".cg")
    top = tl.maximum(tl.max(log, 1), START)
    if HAS_SINKS:
        sink = tl.load(SINKS + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
        total = tl.sum(tl.exp2(log - top[:, None]), 1) + tl.exp2(sink - top)
    else:
        total = tl.sum(tl.exp2(log - top[:, None]), 1)
    return log, top + tl.log2(tl.where(total > 0, total, 1.0))


@triton.jit(do_not_specialize=SPLIT_NUMBERS, do_not_specialize_on_alignment=("VALID", "SINKS"))
def step_split(Q, K, V, SINKS, VALID, MASSES, sq_b, sq_h, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, keys, position, j0, left,
               right, ROOM, LABELS, BIAS, PART_OF, SLOT, DONE, chosen, label_stride, bias_h, bias_q, scale, cap,
               KV: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, HAS_LEFT: tl.constexpr,
               HAS_RIGHT: tl.constexpr, HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr,
               SOFTCAP: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
               DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr):  # fmt: skip
    """MASSES [batch, chosen head, 1, group]; SLOT: a head's place among the chosen ones, or -1. DONE [batch * KV]
    counts the programs of a lane, and is 0 between launches."""
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    lane = tl.program_id(1)
    batch = (lane // KV).to(tl.int64)
    kv_head = lane % KV
    row = tl.arange(0, BM)
    there = row < GROUP * PARTS
    head = kv_head * GROUP + row % GROUP
    part = row // GROUP
    dim = tl.arange(0, DP)
    vdim = tl.arange(0, DVP)
    q_at = Q + (batch * sq_b + head.to(tl.int64)[:, None] * sq_h) * UNIT + dim[None, :]
    q = tl.load(q_at, mask=there[:, None] & (dim < D)[None, :], other=0.0)
    k_at = K + (batch * sk_b + kv_head.to(tl.int64) * sk_h) * UNIT
    v_at = V + (batch * sv_b + kv_head.to(tl.int64) * sv_h) * UNIT
    label_at = LABELS + batch * label_stride + j0
    if HAS_BIAS:
        query_label = tl.load(label_at + position)
        bias_at = BIAS + tl.where(there, head, 0) * bias_h + query_label * bias_q

    low = position * 0
    high = low + keys
    if HAS_RIGHT:
        high = tl.minimum(high, position + right + 1)
    if HAS_LEFT:
        low = tl.maximum(position - left, 0)
    start = low // BN * BN
    stretch = tl.cdiv(tl.cdiv(high - start, splits), BN) * BN
    begin = start + split * stretch
    end = tl.minimum(begin + stretch, high)

    m = tl.full([BM], START, tl.float32)
    l = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, DVP], tl.float32)
    for first in range(begin, end, BN):
        column = first + tl.arange(0, BN)
        inside = column < end
        k = tl.load(k_at + column.to(tl.int64)[:, None] * sk_k * UNIT + dim[None, :],
                    mask=inside[:, None] & (dim < D)[None, :], other=0.0)  # fmt: skip
        s = raw_scores(q, k, scale, cap, SOFTCAP, EXACT)
        seen = inside
        if HAS_LEFT:
            seen = seen & (column >= low)
        if HAS_VALID:
            seen = seen & (tl.load(VALID + batch * keys + column, mask=inside, other=0) != 0)
        if HAS_BIAS or PARTS > 1:
            label = tl.load(label_at + column, mask=inside, other=0)
        if HAS_BIAS:
            s += tl.load(bias_at[:, None] + label[None, :])
        seen = seen[None, :]
        if PARTS > 1:
            seen = seen & (tl.load(PART_OF + label)[None, :] == part[:, None])
        s = tl.where(seen, tl.maximum(s, NEG), NEG)
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        alpha = tl.exp2(m - new)
        l = alpha * l + tl.sum(p, 1)
        v = tl.load(v_at + column.to(tl.int64)[:, None] * sv_k * UNIT + vdim[None, :],
                    mask=inside[:, None] & (vdim < DV)[None, :], other=0.0)  # fmt: skip
        o = o * alpha[:, None]
        if EXACT:
            o = tl.dot(p, v, o, input_precision="tf32x3")
        else:
            o = tl.dot(p.to(V.dtype.element_ty), v, o)
        m = new

    some = tl.where(l > 0, l, 1.0)
    rows = tl.num_programs(1) * GROUP * splits * PARTS
    at = ((batch.to(tl.int32) * KV * GROUP + head) * splits + split) * PARTS + part
    tl.store(ROOM + at[:, None] * DV + vdim[None, :], o / some[:, None], mask=there[:, None] & (vdim < DV)[None, :])
    tl.store(ROOM + rows * DV + at, tl.where(l > 0, m + tl.log2(some), float("-inf")), mask=there)
    if PARTS > 1:
        tl.debug_barrier()
        if tl.atomic_add(DONE + lane, 1, sem="acq_rel") == splits - 1:
            tl.store(DONE + lane, 0)
            member = tl.arange(0, GP)
            mine = member < GROUP
            own = kv_head * GROUP + tl.where(mine, member, 0)
            slot = tl.where(mine, tl.load(SLOT + own), -1)
            log, whole = put_together(ROOM + rows * DV, SINKS, (lane // KV) * KV * GROUP + own, own, splits * PARTS,
                                      HAS_SINKS, SP)  # fmt: skip
            a = tl.exp2(log - whole[:, None])
            group = (tl.arange(0, SP) % PARTS)[None, :]
            mass_at = MASSES + ((lane // KV) * chosen + slot) * (PARTS - 1)
            for number in tl.static_range(PARTS - 1):
                tl.store(mass_at + number, tl.sum(tl.where(group == number, a, 0.0), 1), mask=slot >= 0)


@triton.jit(do_not_specialize=MERGE_NUMBERS, do_not_specialize_on_alignment=("FACTORS", "SINKS"))
def step_merge(SINKS, FACTORS, OUT, splits, query_at,
               ROOM, SLOT, GAIN, LABELS, FLAG, chosen, label_stride, segments, weighed_label,
               H: tl.constexpr, PARTS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_GAIN: tl.constexpr,
               ONE_LABEL: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SP: tl.constexpr,
               BR: tl.constexpr):  # fmt: skip
    """One head of OUT [batch, 1, head, value_dim]; FACTORS [batch, chosen head, 1, group]; SLOT: a head's place among
    the chosen ones, or -1. FLAG becomes 1 where a factor is negative or not finite."""
    head = tl.program_id(0)
    batch = tl.program_id(1)
    row = batch * H + head
    count = splits * PARTS
    rows = tl.num_programs(1) * H * count
    one = tl.arange(0, 1)
    _, wholes = put_together(ROOM + rows * DV, SINKS, row + one, head + one, count, HAS_SINKS, SP)
    whole = tl.sum(wholes, 0)
    query_label = tl.load(LABELS + batch.to(tl.int64) * label_stride + query_at)
    weighs = head < 0
    slot = head * 0
    if PARTS > 1:
        slot = tl.load(SLOT + head)
        weighs = slot >= 0
        if ONE_LABEL:
            weighs = weighs & (query_label == weighed_label)
    vdim = tl.arange(0, DVP)
    o = tl.zeros([DVP], tl.float32)
    for first in range(0, count, BR):
        piece = first + tl.arange(0, BR)
        here = piece < count
        w = tl.exp2(tl.load(ROOM + rows * DV + row * count + piece, mask=here, other=float("-inf")) - whole)
        if PARTS > 1:
            group = piece % PARTS
            asked = here & weighs & (group < PARTS - 1)
            factor_at = FACTORS + (batch * chosen + slot) * (PARTS - 1) + group
            factor = tl.load(factor_at, mask=asked, other=1.0)
            good = (factor >= 0) & (factor < float("inf"))
            tl.store(FLAG + piece * 0, 1, mask=here & (good == 0))
            w = w * factor
        part = tl.load(ROOM + (row * count + piece)[:, None] * DV + vdim[None, :],
                       mask=here[:, None] & (vdim < DV)[None, :], other=0.0)  # fmt: skip
        o += tl.sum(w[:, None] * part, 0)
    if HAS_GAIN:
        o = o * tl.load(GAIN + head * segments + query_label)
    tl.store(OUT + row * DV + vdim, o.to(OUT.dtype.element_ty), mask=vdim < DV)
