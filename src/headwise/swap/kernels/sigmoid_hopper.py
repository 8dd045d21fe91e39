"""Sigmoid attention on Hopper: forward, and a backward of two kernels, without atomics, so the same twice.

    p_ij = sigmoid(scale q_i.k_j + b)      o_i = sum_j p_ij v_j      ds_ij = (do_i.v_j) p_ij (1 - p_ij)
    dq_i = scale sum_j ds_ij k_j           dk_j = scale sum_i ds_ij q_i          dv_j = sum_i p_ij do_i

There is no maximum and no row sum: a row needs nothing but its tiles, and the backward nothing but the inputs and do.
Every kernel has two warpgroups of 64 rows each and one warp that fetches tiles. What is outside of a tensor arrives as
0 and so adds 0 everywhere: only the causal mask is ever applied.

On this chip the special function unit is as busy with one exponential a score as the tensor cores are with their half
of the work, so the reciprocal is two Newton steps on the ordinary units from a guess by integer arithmetic (2e-4, below
a 16-bit weight's rounding).
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

VARYING = ("heads", "group", "Q", "K", "offset")


@gluon.jit
def sigmoid(y):
    """1 / (1 + 2^-y)."""
    d = 1.0 + gl.exp2(gl.minimum(-y, 100.0))
    r = (2129859015 - d.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
    r = r * (2.0 - d * r)
    return r * (2.0 - d * r)


@gluon.jit
def rows_of(smem, index, ROWS: gl.constexpr, D: gl.constexpr):
    return smem.index(index).reshape([ROWS, D])


@gluon.jit
def fetch(desc, smem, ready, free, i, STAGES: gl.constexpr, batch, head, row):
    """One tile into stage i of a ring, as soon as it is free."""
    stage = i % STAGES
    mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, row, 0], ready.index(stage), smem.index(stage))


@gluon.jit
def fetch_fixed(desc, smem, ready, batch, head, row):
    """The rows both warpgroups stay with, a half for each."""
    for w in gl.static_range(2):
        mbarrier.expect(ready.index(w), desc.block_type.nbytes)
        where = [batch, head, row + w * desc.block_type.shape[2], 0]
        tma.async_copy_global_to_shared(desc, where, ready.index(w), smem.index(w))


@gluon.jit
def space(desc, COUNT: gl.constexpr):
    """Shared memory for some tiles, each with a barrier that says it has arrived."""
    shape: gl.constexpr = desc.block_type.shape
    smem = gl.allocate_shared_memory(desc.dtype, [COUNT, shape[0], shape[1], shape[2], shape[3]], desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(ready.index(i), count=1)
    return smem, ready


@gluon.jit
def ring(desc, STAGES: gl.constexpr):
    """The same, used over and over: a stage is free when both warpgroups have let it go."""
    smem, ready = space(desc, STAGES)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(free.index(i), count=2)
    return smem, ready, free


@gluon.jit
def store_rows(to, x, row, rows, stride, D: gl.constexpr, LAYOUT: gl.constexpr):
    column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    at = to + row.to(gl.int64)[:, None] * stride + column[None, :]
    gl.store(at, x, mask=(row < rows)[:, None])


@gluon.jit
def query_block(heads, group, Q, K, offset, CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """Which queries a program does, and the key tiles these see, counted from the last; `masked` of them need the mask.
    Blocks with most keys go first; heads that share keys run side by side."""
    q_tiles = gl.cdiv(Q, BM)
    pid = gl.program_id(0)
    q_tile = q_tiles - 1 - (pid // group) % q_tiles
    rest = pid // group // q_tiles
    kv_head = rest % (heads // group)
    tiles = gl.cdiv(K, BN)
    masked = 0
    if CAUSAL:
        tiles = gl.minimum(tiles, gl.cdiv(gl.maximum(offset + (q_tile + 1) * BM, 0), BN))
        masked = tiles - gl.minimum(tiles, gl.maximum(offset + q_tile * BM + 1, 0) // BN)
    return rest // (heads // group), kv_head * group + pid % group, kv_head, q_tile * BM, tiles, masked


@gluon.jit
def seen_weights(s, row, column, scale, b, CAUSAL: gl.constexpr, KEYS_DOWN: gl.constexpr):
    """Weights of a tile of scores; with a causal mask 0 where the key is after the query."""
    p = sigmoid(s * scale + b)
    if CAUSAL:
        if KEYS_DOWN:
            p = gl.where(row[:, None] <= column[None, :], p, 0.0)
        else:
            p = gl.where(column[None, :] <= row[:, None], p, 0.0)
    return p


@gluon.jit
def forward_consumer(W: gl.constexpr, mem, out, numbers, place, CAUSAL: gl.constexpr, BM: gl.constexpr,
                     BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    q_smem, q_ready, k_smem, k_ready, k_free, v_smem, v_ready, v_free = mem
    so_b, so_h, so_q, Q, offset, scale, b = numbers
    batch, head, q_start, tiles, masked = place
    ROWS: gl.constexpr = BM // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = q_smem.dtype
    position = q_start + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + offset
    column = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    q = rows_of(q_smem, W, ROWS, D)
    empty = gl.full([ROWS, BN], 0.0, gl.float32, LAYOUT)
    o = gl.full([ROWS, D], 0.0, gl.float32, O_LAYOUT)
    mbarrier.wait(q_ready.index(W), 0)
    if tiles > 0:
        mbarrier.wait(k_ready.index(0), 0)
        token = warpgroup_mma(q, rows_of(k_smem, 0, BN, D).permute([1, 0]), empty, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(k_free.index(0))
        p = seen_weights(s, position, column + (tiles - 1) * BN, scale, b, CAUSAL, False)
        pb = gl.convert_layout(p.to(dtype), P_LAYOUT)
        for part in gl.static_range(2):
            low = 1 if part == 0 else gl.maximum(masked, 1)
            high = masked if part == 0 else tiles
            for i in range(low, high):
                stage = i % STAGES
                before = (i - 1) % STAGES
                mbarrier.wait(k_ready.index(stage), (i // STAGES) & 1)
                keys = rows_of(k_smem, stage, BN, D).permute([1, 0])
                token = warpgroup_mma(q, keys, empty, use_acc=False, is_async=True)
                mbarrier.wait(v_ready.index(before), ((i - 1) // STAGES) & 1)
                o_token = warpgroup_mma(pb, rows_of(v_smem, before, BN, D), o, is_async=True)
                s = warpgroup_mma_wait(1, deps=[token])
                mbarrier.arrive(k_free.index(stage))
                p = seen_weights(s, position, column + (tiles - 1 - i) * BN, scale, b, CAUSAL and part == 0, False)
                o, pb = warpgroup_mma_wait(0, deps=[o_token, pb])
                mbarrier.arrive(v_free.index(before))
                pb = gl.convert_layout(p.to(dtype), P_LAYOUT)
        final = (tiles - 1) % STAGES
        mbarrier.wait(v_ready.index(final), ((tiles - 1) // STAGES) & 1)
        o_token = warpgroup_mma(pb, rows_of(v_smem, final, BN, D), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o_token])
    row = q_start + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, O_LAYOUT))
    to = out + batch.to(gl.int64) * so_b + head.to(gl.int64) * so_h
    store_rows(to, o.to(dtype), row, Q, so_q, D, O_LAYOUT)


@gluon.jit
def forward_producer(descs, mem, batch, head, kv_head, q_start, tiles, BN: gl.constexpr, STAGES: gl.constexpr):
    q_desc, k_desc, v_desc = descs
    q_smem, q_ready, k_smem, k_ready, k_free, v_smem, v_ready, v_free = mem
    fetch_fixed(q_desc, q_smem, q_ready, batch, head, q_start)
    for i in range(tiles):
        first = (tiles - 1 - i) * BN
        fetch(k_desc, k_smem, k_ready, k_free, i, STAGES, batch, kv_head, first)
        fetch(v_desc, v_smem, v_ready, v_free, i, STAGES, batch, kv_head, first)


@gluon.jit(do_not_specialize=VARYING)
def sigmoid_forward(q_desc, k_desc, v_desc, out, so_b, so_h, so_q, heads, group, Q, K, offset, scale, b,
                    CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
                    STAGES: gl.constexpr):  # fmt: skip
    batch, head, kv_head, q_start, tiles, masked = query_block(heads, group, Q, K, offset, CAUSAL, BM, BN)
    q_smem, q_ready = space(q_desc, 2)
    k_smem, k_ready, k_free = ring(k_desc, STAGES)
    v_smem, v_ready, v_free = ring(v_desc, STAGES)
    fence_async_shared()
    mem = (q_smem, q_ready, k_smem, k_ready, k_free, v_smem, v_ready, v_free)
    numbers = (so_b, so_h, so_q, Q, offset, scale, b)
    place = (batch, head, q_start, tiles, masked)
    gl.warp_specialize([
        (forward_consumer, (0, mem, out, numbers, place, CAUSAL, BM, BN, D, STAGES)),
        (forward_consumer, (1, mem, out, numbers, place, CAUSAL, BM, BN, D, STAGES)),
        (forward_producer, ((q_desc, k_desc, v_desc), mem, batch, head, kv_head, q_start, tiles, BN, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def dq_consumer(W: gl.constexpr, mem, dq, numbers, place, CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    q_smem, q_ready, do_smem, do_ready, k_smem, k_ready, k_free, v_smem, v_ready, v_free = mem
    so_b, so_h, so_q, Q, offset, scale, b, factor = numbers
    batch, head, q_start, tiles, masked = place
    ROWS: gl.constexpr = BM // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = q_smem.dtype
    position = q_start + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + offset
    column = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    q = rows_of(q_smem, W, ROWS, D)
    do = rows_of(do_smem, W, ROWS, D)
    empty = gl.full([ROWS, BN], 0.0, gl.float32, LAYOUT)
    grad = gl.full([ROWS, D], 0.0, gl.float32, O_LAYOUT)
    mbarrier.wait(q_ready.index(W), 0)
    mbarrier.wait(do_ready.index(W), 0)
    for part in gl.static_range(2):
        low = 0 if part == 0 else masked
        high = masked if part == 0 else tiles
        for i in range(low, high):
            stage = i % STAGES
            phase = (i // STAGES) & 1
            mbarrier.wait(k_ready.index(stage), phase)
            keys = rows_of(k_smem, stage, BN, D)
            token = warpgroup_mma(q, keys.permute([1, 0]), empty, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(stage), phase)
            values = rows_of(v_smem, stage, BN, D).permute([1, 0])
            dp_token = warpgroup_mma(do, values, empty, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[token])
            p = seen_weights(s, position, column + (tiles - 1 - i) * BN, scale, b, CAUSAL and part == 0, False)
            p = p - p * p
            dp = warpgroup_mma_wait(0, deps=[dp_token])
            mbarrier.arrive(v_free.index(stage))
            ds = gl.convert_layout((dp * p).to(dtype), P_LAYOUT)
            token = warpgroup_mma(ds, keys, grad, is_async=True)
            grad, ds = warpgroup_mma_wait(0, deps=[token, ds])
            mbarrier.arrive(k_free.index(stage))
    row = q_start + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, O_LAYOUT))
    to = dq + batch.to(gl.int64) * so_b + head.to(gl.int64) * so_h
    store_rows(to, (grad * factor).to(dtype), row, Q, so_q, D, O_LAYOUT)


@gluon.jit
def dq_producer(descs, mem, batch, head, kv_head, q_start, tiles, BN: gl.constexpr, STAGES: gl.constexpr):
    q_desc, do_desc, k_desc, v_desc = descs
    q_smem, q_ready, do_smem, do_ready, k_smem, k_ready, k_free, v_smem, v_ready, v_free = mem
    fetch_fixed(q_desc, q_smem, q_ready, batch, head, q_start)
    fetch_fixed(do_desc, do_smem, do_ready, batch, head, q_start)
    for i in range(tiles):
        first = (tiles - 1 - i) * BN
        fetch(k_desc, k_smem, k_ready, k_free, i, STAGES, batch, kv_head, first)
        fetch(v_desc, v_smem, v_ready, v_free, i, STAGES, batch, kv_head, first)


@gluon.jit(do_not_specialize=VARYING)
def sigmoid_dq(q_desc, do_desc, k_desc, v_desc, dq, so_b, so_h, so_q, heads, group, Q, K, offset, scale, b, factor,
               CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    batch, head, kv_head, q_start, tiles, masked = query_block(heads, group, Q, K, offset, CAUSAL, BM, BN)
    q_smem, q_ready = space(q_desc, 2)
    do_smem, do_ready = space(do_desc, 2)
    k_smem, k_ready, k_free = ring(k_desc, STAGES)
    v_smem, v_ready, v_free = ring(v_desc, STAGES)
    fence_async_shared()
    mem = (q_smem, q_ready, do_smem, do_ready, k_smem, k_ready, k_free, v_smem, v_ready, v_free)
    numbers = (so_b, so_h, so_q, Q, offset, scale, b, factor)
    place = (batch, head, q_start, tiles, masked)
    descs = (q_desc, do_desc, k_desc, v_desc)
    gl.warp_specialize([
        (dq_consumer, (0, mem, dq, numbers, place, CAUSAL, BM, BN, D, STAGES)),
        (dq_consumer, (1, mem, dq, numbers, place, CAUSAL, BM, BN, D, STAGES)),
        (dq_producer, (descs, mem, batch, head, kv_head, q_start, tiles, BN, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def dkv_consumer(W: gl.constexpr, mem, dk, dv, numbers, place, CAUSAL: gl.constexpr, BM: gl.constexpr,
                 BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    k_smem, k_ready, v_smem, v_ready, q_smem, q_ready, q_free, do_smem, do_ready, do_free = mem
    sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, group, K, offset, scale, b, factor = numbers
    batch, kv_head, k_start, first_tile, tiles, masked = place
    ROWS: gl.constexpr = BN // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = q_smem.dtype
    key = k_start + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    place_in_tile = gl.arange(0, BM, gl.SliceLayout(0, LAYOUT)) + offset
    k = rows_of(k_smem, W, ROWS, D)
    v = rows_of(v_smem, W, ROWS, D)
    empty = gl.full([ROWS, BM], 0.0, gl.float32, LAYOUT)
    grad_k = gl.full([ROWS, D], 0.0, gl.float32, O_LAYOUT)
    grad_v = gl.full([ROWS, D], 0.0, gl.float32, O_LAYOUT)
    mbarrier.wait(k_ready.index(W), 0)
    mbarrier.wait(v_ready.index(W), 0)
    i = 0
    for _ in range(group):
        for part in gl.static_range(2):
            low = 0 if part == 0 else masked
            high = masked if part == 0 else tiles
            for n in range(low, high):
                stage = i % STAGES
                phase = (i // STAGES) & 1
                i += 1
                mbarrier.wait(q_ready.index(stage), phase)
                queries = rows_of(q_smem, stage, BM, D)
                token = warpgroup_mma(k, queries.permute([1, 0]), empty, use_acc=False, is_async=True)
                mbarrier.wait(do_ready.index(stage), phase)
                do = rows_of(do_smem, stage, BM, D)
                dp_token = warpgroup_mma(v, do.permute([1, 0]), empty, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, deps=[token])
                query = place_in_tile + (first_tile + n) * BM
                p = seen_weights(s, key, query, scale, b, CAUSAL and part == 0, True)
                pb = gl.convert_layout(p.to(dtype), P_LAYOUT)
                p = p - p * p
                dp = warpgroup_mma_wait(0, deps=[dp_token])
                v_token = warpgroup_mma(pb, do, grad_v, is_async=True)
                ds = gl.convert_layout((dp * p).to(dtype), P_LAYOUT)
                k_token = warpgroup_mma(ds, queries, grad_k, is_async=True)
                grad_v, pb = warpgroup_mma_wait(1, deps=[v_token, pb])
                mbarrier.arrive(do_free.index(stage))
                grad_k, ds = warpgroup_mma_wait(0, deps=[k_token, ds])
                mbarrier.arrive(q_free.index(stage))
    row = k_start + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, O_LAYOUT))
    to = dk + batch.to(gl.int64) * sk_b + kv_head.to(gl.int64) * sk_h
    store_rows(to, (grad_k * factor).to(dtype), row, K, sk_k, D, O_LAYOUT)
    to = dv + batch.to(gl.int64) * sv_b + kv_head.to(gl.int64) * sv_h
    store_rows(to, grad_v.to(dtype), row, K, sv_k, D, O_LAYOUT)


@gluon.jit
def dkv_producer(descs, mem, batch, kv_head, group, k_start, first_tile, tiles, BM: gl.constexpr,
                 STAGES: gl.constexpr):  # fmt: skip
    k_desc, v_desc, q_desc, do_desc = descs
    k_smem, k_ready, v_smem, v_ready, q_smem, q_ready, q_free, do_smem, do_ready, do_free = mem
    fetch_fixed(k_desc, k_smem, k_ready, batch, kv_head, k_start)
    fetch_fixed(v_desc, v_smem, v_ready, batch, kv_head, k_start)
    i = 0
    for member in range(group):
        head = kv_head * group + member
        for n in range(tiles):
            first = (first_tile + n) * BM
            fetch(q_desc, q_smem, q_ready, q_free, i, STAGES, batch, head, first)
            fetch(do_desc, do_smem, do_ready, do_free, i, STAGES, batch, head, first)
            i += 1


@gluon.jit(do_not_specialize=VARYING)
def sigmoid_dkv(k_desc, v_desc, q_desc, do_desc, dk, dv, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, heads, group, Q, K, offset,
                scale, b, factor, CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    """One block of BN keys of one key-value head, and all queries of the heads that share it, from the first that sees
    one of them. Blocks with most queries go first."""
    kv_heads = heads // group
    pid = gl.program_id(0)
    kv_head = pid % kv_heads
    k_tiles = gl.cdiv(K, BN)
    k_start = (pid // kv_heads) % k_tiles * BN
    batch = pid // kv_heads // k_tiles
    first_tile = 0
    masked = 0
    q_tiles = gl.cdiv(Q, BM)
    if CAUSAL:
        first_tile = gl.minimum(gl.maximum(k_start - offset, 0) // BM, q_tiles)
        masked = gl.minimum(gl.cdiv(gl.maximum(k_start + BN - 1 - offset, 0), BM), q_tiles) - first_tile
    tiles = q_tiles - first_tile
    k_smem, k_ready = space(k_desc, 2)
    v_smem, v_ready = space(v_desc, 2)
    q_smem, q_ready, q_free = ring(q_desc, STAGES)
    do_smem, do_ready, do_free = ring(do_desc, STAGES)
    fence_async_shared()
    mem = (k_smem, k_ready, v_smem, v_ready, q_smem, q_ready, q_free, do_smem, do_ready, do_free)
    numbers = (sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, group, K, offset, scale, b, factor)
    place = (batch, kv_head, k_start, first_tile, tiles, masked)
    descs = (k_desc, v_desc, q_desc, do_desc)
    gl.warp_specialize([
        (dkv_consumer, (0, mem, dk, dv, numbers, place, CAUSAL, BM, BN, D, STAGES)),
        (dkv_consumer, (1, mem, dk, dv, numbers, place, CAUSAL, BM, BN, D, STAGES)),
        (dkv_producer, (descs, mem, batch, kv_head, group, k_start, first_tile, tiles, BM, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip
