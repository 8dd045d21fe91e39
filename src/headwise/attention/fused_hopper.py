"""The fused forward kernel for Hopper: two warpgroups of 64 queries each, and one warp that fetches keys and values.

Each warpgroup has the scores of the next key tile computed while it works on the weights of this one, so the tensor
cores and the exponentials overlap (the order of FlashAttention-3, arXiv 2407.08608). On top of that:

- Segments cost almost nothing: keys are walked from the last to the first, as runs of equal labels. A run's mass is the
  row sum since the run began, so there is no matrix of masses; a run's sum is stored once, when the run ends.
- A bias per query and key segment is one number a row as long as the run lasts.
- Entropy is one more multiply-add per weight: t = sum p x with x = s - m in base 2, and p = 2^x.
- Row sums stay spread over the four lanes that share a row until they are needed.

Masses are left as base-2 logs of the unnormalised sums; the caller divides (`fused_hopper_call.py`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Masked scores, and the running maximum before any key: NEG - START is far below any exponent, so masked keys weigh 0
# even in rows that see no key at all, and no -inf - -inf arises.
NEG = gl.constexpr(-1e30)
START = gl.constexpr(-1e20)
LN2 = gl.constexpr(0.6931471805599453)
VARYING = ("heads", "group", "Q", "K", "offset", "run_stride", "tile_stride", "bias_b", "bias_h", "bias_q")


@gluon.jit
def lane_sum(x, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Row sums, one part for each of the four lanes that hold a row."""
    x = gl.permute(gl.reshape(x, [ROWS, COLS // 8, 4, 2]), [0, 2, 1, 3])
    return gl.sum(gl.reshape(x, [ROWS, 4, COLS // 4]), 2)


@gluon.jit
def log_of(p):
    """Base-2 log of weights by the special function unit; p log p is 0 where p is 0."""
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [gl.maximum(p, 1e-37)], gl.float32, True, 1)


@gluon.jit
def hide(s, position, first, K, CAUSAL: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):
    """Scores of keys past the end, or after the query, set to NEG."""
    column = first + gl.arange(0, BN, gl.SliceLayout(0, layout))
    s = gl.where((column < K)[None, :], s, NEG)
    if CAUSAL:
        s = gl.where(column[None, :] <= position[:, None], s, NEG)
    return s


@gluon.jit
def add_bias(s, b, next_b, run, start, next_start, first, runs, row_bias, scale, BN: gl.constexpr,
             layout: gl.constexpr):  # fmt: skip
    """A tile in which runs begin: every run's bias, put into the scores. The row's bias is then 0."""
    column = first + gl.arange(0, BN, gl.SliceLayout(0, layout))
    inverse = 1.0 / scale
    s = gl.where((column >= start)[None, :], s + (b * inverse)[:, None], s)
    edge = start
    here = next_start
    value = next_b
    run -= 1
    while edge > first:
        s = gl.where(((column >= here) & (column < edge))[None, :], s + (value * inverse)[:, None], s)
        edge = here
        if edge > first:
            run -= 1
            here = gl.load(runs + 2 * run)
            value = gl.load(row_bias + run)
    return s


@gluon.jit
def run_at(runs, run):
    """A run's first key and its label (with a flag in bit 8 for labels that occur in more than one run)."""
    return gl.load(runs + 2 * run), gl.load(runs + 2 * run + 1)


@gluon.jit
def close_run(l, t, m, label, mass, inner, valid, ROW: gl.constexpr, INNER: gl.constexpr):
    """Store the log mass of a finished run, and its entropy within the run, merged with earlier runs of its label."""
    total = gl.convert_layout(gl.sum(l, 1), ROW)
    log = m + gl.log2(total)
    again = label >= 256
    label = label & 255
    spread = log
    if INNER:
        part = gl.convert_layout(gl.sum(t, 1), ROW)
        spread = gl.where(total > 0, gl.log2(total) - part / total, 0.0)
    if again:
        old = gl.load(mass + label, mask=valid, other=0.0)
        top = gl.maximum(gl.maximum(old, log), START)
        both = top + gl.log2(gl.exp2(old - top) + gl.exp2(log - top))
        if INNER:
            u = gl.maximum(old - both, START)
            w = gl.maximum(log - both, START)
            before = gl.load(inner + label, mask=valid, other=0.0)
            spread = gl.exp2(u) * (before - u) + gl.exp2(w) * (spread - w)
            spread = gl.where(both > START, spread, 0.0)
        log = both
    gl.store(mass + label, log, mask=valid)
    if INNER:
        gl.store(inner + label, spread, mask=valid)


@gluon.jit
def weights(s, m, b, scale, BIAS: gl.constexpr):
    """New maximum, exponents x and weights 2^x of one tile of scores."""
    top = gl.max(s, 1) * scale
    if BIAS:
        top += b
    new = gl.maximum(m, top)
    shift = b - new if BIAS else -new
    x = s * scale + shift[:, None]
    return new, x, gl.exp2(x)


@gluon.jit
def count(p, x, l, t, lr, tr, dm, alpha, m, run, start, label, b, next_start, next_label, next_b, first,
          runs, mass, inner, row_bias, valid,
          MASS: gl.constexpr, INNER: gl.constexpr, ENTROPY: gl.constexpr, BIAS: gl.constexpr,
          ROWS: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Add one tile's weights to the sums of the row and of its run; close the runs that begin in this tile."""
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    amount = lane_sum(p, ROWS, BN)
    spread = amount
    if ENTROPY or INNER:
        spread = lane_sum(p * x, ROWS, BN)
        t = alpha * (t + dm * l) + spread
    l = alpha * l + amount
    if MASS:
        if INNER:
            tr = alpha * (tr + dm * lr)
        lr = alpha * lr
        if start > first:
            column = first + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
            edge = first + BN
            while start > first:
                part = gl.where(((column >= start) & (column < edge))[None, :], p, 0.0)
                lr += lane_sum(part, ROWS, BN)
                if INNER:
                    tr += lane_sum(part * log_of(part), ROWS, BN)
                close_run(lr, tr, m, label, mass, inner, valid, ROW, INNER)
                lr = lr * 0.0
                tr = tr * 0.0
                # The next run is known already, the one after it is fetched now: nothing waits for memory.
                edge = start
                start = next_start
                label = next_label
                run -= 1
                after = gl.maximum(run - 1, 0)
                next_start, next_label = run_at(runs, after)
                if BIAS:
                    b = next_b
                    next_b = gl.load(row_bias + after)
            part = gl.where((column < edge)[None, :], p, 0.0)
            lr = lane_sum(part, ROWS, BN)
            if INNER:
                tr = lane_sum(part * log_of(part), ROWS, BN)
        else:
            lr += amount
            if INNER:
                tr += spread
    return l, t, lr, tr, run, start, label, b, next_start, next_label, next_b


@gluon.jit
def consumer(W: gl.constexpr, mem, tensors, numbers, place,
             G: gl.constexpr, CAUSAL: gl.constexpr, MASS: gl.constexpr, INNER: gl.constexpr, ENTROPY: gl.constexpr,
             BIAS: gl.constexpr, SINKS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free = mem
    out, lse, entropy, mass, inner, runs, run_of_tile, bias, query_labels, sinks = tensors
    so_b, so_h, so_q, heads, Q, K, offset, scale, run_stride, tile_stride, bias_b, bias_h, bias_q = numbers
    batch, head, q_tile, tiles, masked, last = place
    ROWS: gl.constexpr = BM // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    dtype: gl.constexpr = q_smem.dtype
    row = q_tile * BM + W * ROWS + gl.arange(0, ROWS, ROW)
    valid = row < Q
    position = row + offset
    at = (batch * heads + head).to(gl.int64) * Q + row
    q = q_smem.index(W).reshape([ROWS, D])

    m = gl.full([ROWS], START, gl.float32, ROW)
    empty = gl.full([ROWS, BN], 0.0, gl.float32, LAYOUT)
    l = lane_sum(empty, ROWS, BN)
    PART: gl.constexpr = gl.SliceLayout(1, l.type.layout)
    t = l
    lr = l
    tr = l
    b = m
    o = gl.full([ROWS, D], 0.0, gl.float32, O_LAYOUT)
    run = 0
    start = 0
    label = 0
    next_start = 0
    next_label = 0
    next_b = b
    mass += at * G
    inner += at * G
    row_bias = bias + gl.zeros([ROWS], gl.int32, ROW)
    if MASS:
        runs += batch * run_stride
        run = gl.load(run_of_tile + batch * tile_stride + last)
        start, label = run_at(runs, run)
        next_start, next_label = run_at(runs, gl.maximum(run - 1, 0))
    if BIAS:
        segment = gl.load(query_labels + batch * Q + row, mask=valid, other=0)
        row_bias += batch * bias_b + head * bias_h + segment * bias_q
        b = gl.load(row_bias + run)
        next_b = gl.load(row_bias + gl.maximum(run - 1, 0))

    mbarrier.wait(q_ready.index(W), 0)
    mbarrier.wait(k_ready.index(0), 0)
    token = warpgroup_mma(q, k_smem.index(0).reshape([BN, D]).permute([1, 0]), empty, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[token])
    mbarrier.arrive(k_free.index(0))
    s = hide(s, position, last * BN, K, CAUSAL, BN, LAYOUT)
    if BIAS:
        if start > last * BN:
            s = add_bias(s, b, next_b, run, start, next_start, last * BN, runs, row_bias, scale, BN, LAYOUT)
            b = b * 0.0
    m, x, p = weights(s, m, b, scale, BIAS)
    l, t, lr, tr, run, start, label, b, next_start, next_label, next_b = count(
        p, x, l, t, lr, tr, l, l, m, run, start, label, b, next_start, next_label, next_b, last * BN,
        runs, mass, inner, row_bias, valid, MASS, INNER, ENTROPY, BIAS, ROWS, BN, LAYOUT)  # fmt: skip
    pb = gl.convert_layout(p.to(dtype), P_LAYOUT)
    for part in gl.static_range(2):
        low = 1 if part == 0 else masked
        high = masked if part == 0 else tiles
        for i in range(low, high):
            stage = i % STAGES
            before = (i - 1) % STAGES
            first = (last - i) * BN
            mbarrier.wait(k_ready.index(stage), (i // STAGES) & 1)
            keys = k_smem.index(stage).reshape([BN, D]).permute([1, 0])
            token = warpgroup_mma(q, keys, empty, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(before), ((i - 1) // STAGES) & 1)
            o_token = warpgroup_mma(pb, v_smem.index(before).reshape([BN, D]), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=[token])
            mbarrier.arrive(k_free.index(stage))
            if part == 0:
                s = hide(s, position, first, K, CAUSAL, BN, LAYOUT)
            if BIAS:
                if start > first:
                    s = add_bias(s, b, next_b, run, start, next_start, first, runs, row_bias, scale, BN, LAYOUT)
                    b = b * 0.0
            new, x, p = weights(s, m, b, scale, BIAS)
            alpha = gl.exp2(m - new)
            dm = gl.convert_layout(m - new, PART)[:, None]
            m = new
            o, pb = warpgroup_mma_wait(0, deps=[o_token, pb])
            mbarrier.arrive(v_free.index(before))
            o = o * gl.convert_layout(alpha, O_ROW)[:, None]
            l, t, lr, tr, run, start, label, b, next_start, next_label, next_b = count(
                p, x, l, t, lr, tr, dm, gl.convert_layout(alpha, PART)[:, None], m, run, start, label, b,
                next_start, next_label, next_b, first, runs, mass, inner, row_bias, valid,
                MASS, INNER, ENTROPY, BIAS, ROWS, BN, LAYOUT)  # fmt: skip
            pb = gl.convert_layout(p.to(dtype), P_LAYOUT)
    final = (tiles - 1) % STAGES
    mbarrier.wait(v_ready.index(final), ((tiles - 1) // STAGES) & 1)
    o_token = warpgroup_mma(pb, v_smem.index(final).reshape([BN, D]), o, is_async=True)
    if MASS:
        close_run(lr, tr, m, label, mass, inner, valid, ROW, INNER)
    total = gl.convert_layout(gl.sum(l, 1), ROW)
    spread = gl.convert_layout(gl.sum(t, 1), ROW)
    if SINKS:
        sink = gl.load(sinks + head) * 1.4426950408889634
        new = gl.maximum(m, sink)
        alpha = gl.exp2(m - new)
        spread = alpha * (spread + (m - new) * total)
        own = alpha * total
        total = own + gl.exp2(sink - new)
        m = new
        norm = 1.0 / total
        gl.store(entropy + at, (gl.log2(total) * own - spread) * norm * LN2, mask=valid & (ENTROPY == 1))
        norm = norm * alpha
    else:
        norm = gl.where(total > 0, 1.0 / total, 0.0)
        if ENTROPY:
            nats = gl.where(total > 0, (gl.log2(total) - spread * norm) * LN2, 0.0)
            gl.store(entropy + at, nats, mask=valid)
    gl.store(lse + at, (m + gl.log2(total)) * LN2, mask=valid)
    o = warpgroup_mma_wait(0, deps=[o_token])
    o = o * gl.convert_layout(norm, O_ROW)[:, None]
    o_row = q_tile * BM + W * ROWS + gl.arange(0, ROWS, O_ROW)
    column = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    base = out + batch.to(gl.int64) * so_b + head.to(gl.int64) * so_h
    gl.store(base + o_row.to(gl.int64)[:, None] * so_q + column[None, :], o.to(dtype), mask=(o_row < Q)[:, None])


@gluon.jit
def producer(descs, mem, batch, head, kv_head, q_tile, tiles, last,
             BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free = mem
    ROWS: gl.constexpr = BM // 2
    for w in gl.static_range(2):
        mbarrier.expect(q_ready.index(w), q_desc.block_type.nbytes)
        where = [batch, head, q_tile * BM + w * ROWS, 0]
        tma.async_copy_global_to_shared(q_desc, where, q_ready.index(w), q_smem.index(w))
    for i in range(tiles):
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        where = [batch, kv_head, (last - i) * BN, 0]
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, where, k_ready.index(stage), k_smem.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, where, v_ready.index(stage), v_smem.index(stage))


@gluon.jit(do_not_specialize=VARYING)
def hopper_forward(q_desc, k_desc, v_desc, out, lse, entropy, mass, inner, runs, run_of_tile, bias, query_labels, sinks,
                   so_b, so_h, so_q, heads, group, Q, K, offset, scale, run_stride, tile_stride, bias_b, bias_h, bias_q,
                   G: gl.constexpr, CAUSAL: gl.constexpr, MASS: gl.constexpr, INNER: gl.constexpr,
                   ENTROPY: gl.constexpr, BIAS: gl.constexpr, SINKS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                   D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """One block of BM queries of one head. Blocks with most keys go first; heads that share keys run side by side."""
    q_tiles = gl.cdiv(Q, BM)
    pid = gl.program_id(0)
    q_tile = q_tiles - 1 - (pid // group) % q_tiles
    rest = pid // group // q_tiles
    kv_heads = heads // group
    kv_head = rest % kv_heads
    batch = rest // kv_heads
    head = kv_head * group + pid % group
    tiles = gl.cdiv(K, BN)
    masked = 1
    if CAUSAL:
        tiles = gl.maximum(gl.cdiv(gl.minimum(K, offset + (q_tile + 1) * BM), BN), 1)
        masked = gl.maximum(tiles - gl.maximum(offset + q_tile * BM + 1, 0) // BN, 1)
    last = tiles - 1

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    mem = (q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free)
    tensors = (out, lse, entropy, mass, inner, runs, run_of_tile, bias, query_labels, sinks)
    numbers = (so_b, so_h, so_q, heads, Q, K, offset, scale, run_stride, tile_stride, bias_b, bias_h, bias_q)
    place = (batch, head, q_tile, tiles, masked, last)
    gl.warp_specialize([
        (consumer, (0, mem, tensors, numbers, place, G, CAUSAL, MASS, INNER, ENTROPY, BIAS, SINKS, BM, BN, D, STAGES)),
        (consumer, (1, mem, tensors, numbers, place, G, CAUSAL, MASS, INNER, ENTROPY, BIAS, SINKS, BM, BN, D, STAGES)),
        (producer, ((q_desc, k_desc, v_desc), mem, batch, head, kv_head, q_tile, tiles, last, BM, BN, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip
