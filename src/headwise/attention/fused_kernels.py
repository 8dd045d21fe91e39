"""The portable fused forward kernel: output and statistics of one block of queries, keys walked from left to right.

One program does the rows of one block, for one split of the keys: a stretch of them (decoding) or the keys of some
segments (Reweight). Every split is a complete attention over its own keys; `fused_merge.py` puts splits together.
Rows are queries of one head, or with PACK the queries of all heads that share a key-value head, query by query.
Masses and segment entropies are small matrix products with one-hot labels; a bias per query and key segment is one too.
Weights enter these products as the sum of two 16-bit numbers, so 22 bits of the result are right; they are at most 1,
and scaled up first, so that this holds for small ones too (16-bit floats end at 6e-8).
"""

import triton
import triton.language as tl

# Masked scores, and the running maximum before any key: masked keys weigh 0 even in rows that see no key at all, and
# no -inf - -inf arises. A knockout enters the bias product as OUT_OF_REACH, since 16-bit floats end there.
NEG = tl.constexpr(-1e30)
START = tl.constexpr(-1e20)
OUT_OF_REACH = tl.constexpr(-6e4)
UP = tl.constexpr(32768.0)
DOWN = tl.constexpr(1 / 32768.0)
# Numbers that change from call to call (a cache grows by one key a token): no new code for each kind of them.
VARYING = ("label_stride", "query_label_stride", "tile_stride", "bias_stride_h", "bias_stride_q", "key_bias_stride",
           "heads", "queries", "keys", "offset", "left", "right", "stretch", "groups", "G")  # fmt: skip
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_dot(x, y, acc, EXACT: tl.constexpr):
    """acc + x @ y for float32 x and 16-bit y; x goes in as high and low part."""
    if EXACT:
        acc = tl.dot(x, y, acc, input_precision="tf32x3")
    else:
        high = x.to(tl.float16)
        acc = tl.dot(high, y, acc)
        acc = tl.dot((x - high.to(tl.float32)).to(tl.float16), y, acc)
    return acc


@triton.jit
def lookup_bias(BIAS, head, query_label, G, GP: tl.constexpr, bias_stride_h, bias_stride_q):
    """The rows of the bias table these queries use, [rows, GP]."""
    slot = tl.arange(0, GP)
    where = head[:, None] * bias_stride_h + query_label[:, None] * bias_stride_q + slot[None, :]
    return tl.maximum(tl.load(BIAS + where, mask=slot[None, :] < G, other=0.0), OUT_OF_REACH)


@triton.jit
def raw_scores(q, k, scale, cap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Scores in base 2: scale holds log2(e), unless a softcap comes first."""
    if EXACT:
        s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    else:
        s = tl.dot(q, tl.trans(k))
    s = s * scale
    if SOFTCAP:
        s = (cap - 2 * cap / (1 + tl.exp2(s * (2 * LOG2E / cap)))) * LOG2E
    return s


@triton.jit
def visible(column, position, K, valid, left, right, RIGHT: tl.constexpr, LEFT: tl.constexpr, VALID: tl.constexpr):
    """Which keys the rows may see: i - j <= left, j - i <= right, and the key is no padding."""
    seen = (column < K)[None, :]
    if VALID:
        seen = seen & valid[None, :]
    if RIGHT:
        seen = seen & (column[None, :] - position[:, None] <= right)
    if LEFT:
        seen = seen & (position[:, None] - column[None, :] <= left)
    return seen


@triton.jit(do_not_specialize=VARYING)
def forward(Q, K, V, OUT, LSE, ENTROPY, MASS, INNER, DISTANCE, DISTANCE_SQ, TOP, TOP_INDEX,
            POSITION, VALID, LABELS, QUERY_LABELS, TILE_LIST, TILES_BEFORE, GROUP_BITS, BIAS, KEY_BIAS, SINKS,
            sq_b, sq_h, sq_q, sk_b, sk_h, sk_k, sv_b, sv_h, sv_k, so_s, so_b, so_h, so_q,
            label_stride, query_label_stride, tile_stride, bias_stride_h, bias_stride_q, key_bias_stride,
            heads, queries, keys, offset, left, right, scale, cap, stretch, groups, G,
            group: tl.constexpr, PACK: tl.constexpr, POSITIONS: tl.constexpr, HAS_RIGHT: tl.constexpr,
            HAS_LEFT: tl.constexpr, HAS_VALID: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
            HAS_LABELS: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
            W_OUT: tl.constexpr, W_MASS: tl.constexpr, W_ENTROPY: tl.constexpr, W_INNER: tl.constexpr,
            W_DISTANCE: tl.constexpr, W_TOP: tl.constexpr, EXACT: tl.constexpr,
            D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, GP: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    kv_heads = heads // group
    lane = tl.program_id(1)
    split = tl.program_id(2)
    place = tl.arange(0, BM)
    rows = queries * group if PACK else queries
    # Blocks with most keys go first.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + place
    there = row < rows
    if PACK:
        batch = lane // kv_heads
        kv_head = lane % kv_heads
        query = row // group
        head = kv_head * group + row % group
    else:
        batch = lane // heads
        kv_head = (lane % heads) // group
        query = row
        head = row * 0 + lane % heads
    query = tl.minimum(query, queries - 1)
    if POSITIONS:
        position = tl.load(POSITION + query)
    else:
        position = query + offset
    batch = batch.to(tl.int64)
    dim = tl.arange(0, DP)
    vdim = tl.arange(0, DVP)
    q_at = Q + batch * sq_b + head.to(tl.int64)[:, None] * sq_h + query.to(tl.int64)[:, None] * sq_q + dim[None, :]
    q = tl.load(q_at, mask=there[:, None] & (dim < D)[None, :], other=0.0)
    k_at = K + batch * sk_b + kv_head.to(tl.int64) * sk_h
    v_at = V + batch * sv_b + kv_head.to(tl.int64) * sv_h
    kind = tl.float32 if EXACT else tl.float16

    lowest = tl.min(position)
    highest = tl.max(position)
    low = (split // groups) * stretch
    high = tl.minimum(low + stretch, keys)
    full_low = low
    full_high = high
    if HAS_RIGHT:
        high = tl.minimum(high, highest + right + 1)
        full_high = tl.minimum(full_high, lowest + right + 1)
    if HAS_LEFT:
        low = tl.maximum(low, (highest * 0 + lowest - left) // BN * BN)
        full_low = tl.maximum(full_low, highest - left)
    full_low = tl.cdiv(full_low, BN) * BN
    full_high = tl.maximum(full_high, 0) // BN * BN
    if HAS_VALID or HAS_GROUPS:
        full_high = full_low * 0
    full_high = tl.maximum(full_high, full_low) if HAS_LEFT else tl.maximum(full_high, low)
    if HAS_GROUPS:
        wanted = tl.load(GROUP_BITS + split % groups)
        tiles = tl.cdiv(keys, BN)
        of = (batch * tile_stride).to(tl.int32) + split % groups
        tile_list = TILE_LIST + of * tiles
        tiles_before = TILES_BEFORE + of * (tiles + 1)
    if HAS_BIAS:
        query_label = tl.load(QUERY_LABELS + batch * query_label_stride + query)
        row_bias = lookup_bias(BIAS, head, query_label, G, GP, bias_stride_h, bias_stride_q)

    m = tl.full([BM], START, tl.float32)
    l = tl.zeros([BM], tl.float32)
    t = tl.zeros([BM], tl.float32)
    far = tl.zeros([BM], tl.float32)
    far_sq = tl.zeros([BM], tl.float32)
    best = tl.full([BM], -1, tl.int32)
    mass = tl.zeros([BM, GP], tl.float32)
    inner = tl.zeros([BM, GP], tl.float32)
    o = tl.zeros([BM, DVP], tl.float32)
    for phase in tl.static_range(0 if HAS_LEFT else 1, 3):
        begin = low if phase == 0 else (full_low if phase == 1 else full_high)
        end = tl.minimum(full_low, high) if phase == 0 else (full_high if phase == 1 else high)
        if HAS_GROUPS:
            # The tiles that hold keys of the group, by their numbers: a branch in the loop would be slower, and
            # Triton 3.6 reads past shared memory with one.
            begin = tl.load(tiles_before + tl.minimum(tl.cdiv(begin, BN), tiles))
            end = tl.load(tiles_before + tl.maximum(tl.minimum(tl.cdiv(end, BN), tiles), 0))
        for number in range(begin, end, 1 if HAS_GROUPS else BN):
            first = tl.load(tile_list + number) * BN if HAS_GROUPS else number
            column = first + tl.arange(0, BN)
            inside = column < keys
            k = tl.load(k_at + column.to(tl.int64)[:, None] * sk_k + dim[None, :],
                        mask=inside[:, None] & (dim < D)[None, :], other=0.0)  # fmt: skip
            s = raw_scores(q, k, scale, cap, SOFTCAP, EXACT)
            if HAS_LABELS:
                label = tl.load(LABELS + batch * label_stride + column, mask=inside, other=-1).to(tl.int32)
                onehot = (label[:, None] == tl.arange(0, GP)[None, :]).to(tl.float32).to(kind)
            if HAS_BIAS:
                s = split_dot(row_bias, tl.trans(onehot), s, EXACT)
                s = tl.where(s < OUT_OF_REACH / 2, NEG, s)
            if HAS_KEY_BIAS:
                step = tl.load(
                    KEY_BIAS + head[:, None] * key_bias_stride + column[None, :], mask=inside[None, :], other=0.0
                )
                s = tl.maximum(s + step * LOG2E, NEG)
            if phase != 1:
                valid = inside
                if HAS_VALID:
                    valid = tl.load(VALID + batch * keys + column, mask=inside, other=0) != 0
                if HAS_GROUPS:
                    valid = valid & (((wanted >> tl.where(label < 0, 32, label).to(tl.int64)) & 1) != 0)
                seen = visible(column, position, keys, valid, left, right, HAS_RIGHT, HAS_LEFT, HAS_VALID or HAS_GROUPS)
                s = tl.where(seen, s, NEG)
            if W_TOP:
                top, spot = tl.max(s, 1, return_indices=True)
                best = tl.where(top > m, spot + first, best)
            else:
                top = tl.max(s, 1)
            new = tl.maximum(m, top)
            alpha = tl.exp2(m - new)
            x = s - new[:, None]
            p = tl.exp2(x)
            if W_ENTROPY:
                t = alpha * (t + (m - new) * l) + tl.sum(p * x, 1)
            l = alpha * l + tl.sum(p, 1)
            if W_INNER:
                inner = alpha[:, None] * (inner + (m - new)[:, None] * mass)
                inner = split_dot(p * UP * tl.maximum(x, -1e4), onehot, inner, EXACT)
            if W_MASS:
                mass = split_dot(p * UP, onehot, mass * alpha[:, None], EXACT)
            if W_DISTANCE:
                gap = tl.abs(position[:, None] - column[None, :]).to(tl.float32)
                far = alpha * far + tl.sum(p * gap, 1)
                far_sq = alpha * far_sq + tl.sum(p * gap * gap, 1)
            if W_OUT:
                v = tl.load(v_at + column.to(tl.int64)[:, None] * sv_k + vdim[None, :],
                            mask=inside[:, None] & (vdim < DV)[None, :], other=0.0)  # fmt: skip
                o = o * alpha[:, None]
                if EXACT:
                    o = tl.dot(p, v, o, input_precision="tf32x3")
                else:
                    o = tl.dot(p.to(V.dtype.element_ty), v, o)
            m = new

    norm = tl.where(l > 0, 1.0 / tl.where(l > 0, l, 1.0), 0.0)
    log = tl.where(l > 0, m + tl.log2(tl.where(l > 0, l, 1.0)), float("-inf"))
    # The part of the normaliser that is the keys' own; the rest is the sink column's.
    share = tl.where(l > 0, 1.0, 0.0)
    if HAS_SINKS:
        sink = tl.load(SINKS + head) * LOG2E
        new = tl.maximum(tl.where(l > 0, log, START), sink)
        both = new + tl.log2(tl.exp2(log - new) + tl.exp2(sink - new))
        share = tl.exp2(log - both)
        log = both
        norm = norm * share
    at = (split.to(tl.int64) * (tl.num_programs(1) // (kv_heads if PACK else heads)) + batch) * heads * queries
    at = at + head.to(tl.int64) * queries + query
    tl.store(LSE + at, log * LN2, mask=there)
    if W_OUT:
        o = o * norm[:, None]
        o_at = OUT + split.to(tl.int64) * so_s + batch * so_b + head.to(tl.int64)[:, None] * so_h
        o_at += query.to(tl.int64)[:, None] * so_q + vdim[None, :]
        tl.store(o_at, o.to(OUT.dtype.element_ty), mask=there[:, None] & (vdim < DV)[None, :])
    if W_ENTROPY:
        # -sum a log a = share log Z - sum a s, all relative to the maximum.
        nats = share * tl.where(share > 0, log - m, 0.0) - t * norm
        tl.store(ENTROPY + at, nats * LN2, mask=there)
    if W_DISTANCE:
        tl.store(DISTANCE + at, far * norm, mask=there)
        tl.store(DISTANCE_SQ + at, far_sq * norm, mask=there)
    if W_TOP:
        tl.store(TOP + at, norm, mask=there)
        tl.store(TOP_INDEX + at, best, mask=there)
    slot = tl.arange(0, GP)
    wide = there[:, None] & (slot < G)[None, :]
    if W_MASS:
        mass = mass * DOWN
        tl.store(MASS + at[:, None] * G + slot[None, :], mass * norm[:, None], mask=wide)
    if W_INNER:
        some = tl.where(mass > 0, mass, 1.0)
        within = tl.where(mass > 0, (tl.log2(some) - inner * DOWN / some) * LN2, 0.0)
        tl.store(INNER + at[:, None] * G + slot[None, :], tl.maximum(within, 0.0), mask=wide)
