"""Multi-token attention in Triton: what happens to scores between the products, on some rows of some groups of heads.

    s'_g = scale s_g, less what it counts too much near the diagonal;    s_h = sum_g w_hg s'_g;    a = softmax(s)
    a'[i, j] = sum_a sum_b theta[a, b] a[i - a, j + b],    0 where the query doesn't see the key

Gradients, with da given:  ds = a (da - sum_j a da),   ds'_g = sum_h w_hg ds_h,   dw_hg = sum_ij ds_h s'_g.

Scores, weights and their gradients lie as [group, head, row, key], contiguous. Heads of a group are the rows of small
tensor-core products, which want 16 of them. The convolution is one of tiles with Toeplitz matrices, a matrix for each
query looked back to.
"""

import triton
import triton.language as tl

from headwise.swap.kernels.sigmoid_portable import product

VARYING = ("rows", "first", "keys", "shift", "lanes_before", "out_rows")
LOG2E = tl.constexpr(1.4426950408889634)
NEG = tl.constexpr(-1e30)


@triton.jit
def visible(column, stop, VALID, HAS_VALID: tl.constexpr):
    seen = (column >= 0) & (column < stop)
    if HAS_VALID:
        seen = seen & (tl.load(VALID + column, mask=seen, other=0) != 0)
    return seen


@triton.jit
def across(X, at, there, column, width):
    """One row of a group's heads. What is loaded is bounded by the width, a multiple of 64, so that loads are wide."""
    mask = there[:, None] & (column < width)[None, :]
    return tl.load(X + at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scores(S, BAND, lane, there, row, rows, start, width, position, seen, s_band, scale, E: tl.constexpr,
           BN: tl.constexpr):  # fmt: skip
    """s' of one row of some heads, 0 where not seen."""
    column = start + tl.arange(0, BN)
    at = (lane.to(tl.int64) * rows + row) * width
    x = tl.where(seen[None, :], across(S, at, there, column, width) * scale, 0.0)
    if E > 0 and start + BN > position - E:
        gap = position - column
        near = there[:, None] & (seen & (gap >= 0) & (gap < E))[None, :]
        at = lane.to(tl.int64) * s_band + row * E
        x -= tl.load(BAND + at[:, None] + gap[None, :], mask=near, other=0.0)
    return x


@triton.jit
def mixed(S, BAND, VALID, mix, lane, there, row, rows, start, stop, width, position, s_band, scale,
          HAS_VALID: tl.constexpr, E: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """s of one row of a group's heads, in base 2, NEG where not seen."""
    seen = visible(start + tl.arange(0, BN), stop, VALID, HAS_VALID)
    x = scores(S, BAND, lane, there, row, rows, start, width, position, seen, s_band, scale, E, BN)
    if CP > 1:
        x = product(mix, x, True)
    return tl.where(seen[None, :], x * LOG2E, NEG)


@triton.jit
def log_sum(m, total):
    """Of running maxima and sums of a tile's places; 0 of a row that sees nothing, whose weights are 0."""
    top = tl.max(m, 1)
    whole = tl.sum(total * tl.exp2(m - top[:, None]), 1)
    return tl.where(whole > 0, top + tl.log2(tl.maximum(whole, 1e-37)), 0.0)


@triton.jit(do_not_specialize=VARYING)
def weigh(S, BAND, VALID, MIX, LSE, A, s_band, s_lse, rows, first, keys, width, shift, scale, groups: tl.constexpr,
          CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, AGAIN: tl.constexpr, E: tl.constexpr,
          C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One row of a group of heads: weights, and their log-sum-exp (base 2), which with AGAIN is given."""
    row, unit = tl.program_id(0), tl.program_id(1)
    head = tl.arange(0, CP)
    there = head < C
    lane = unit * C + head
    at = A + ((lane.to(tl.int64) * rows + row) * width)[:, None]
    lse_at = LSE + lane.to(tl.int64) * s_lse + row
    position = first + row
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, position + 1)
    VALID += ((unit + shift) // groups).to(tl.int64) * keys
    mix = lane
    if CP > 1:
        to, source = tl.arange(0, CP)[:, None], tl.arange(0, CP)[None, :]
        mix_at = MIX + ((unit + shift) % groups) * C * C + to * C + source
        mix = tl.load(mix_at, mask=(to < C) & (source < C), other=0.0).to(tl.float32)
    if AGAIN:
        lse = tl.load(lse_at, mask=there, other=0.0)
    else:
        # Every place of a tile has a sum of its own, so that places wait for each other once and not in every tile.
        m = tl.full((CP, BN), -1e20, tl.float32)
        total = tl.zeros((CP, BN), tl.float32)
        for start in range(0, stop, BN):
            x = mixed(S, BAND, VALID, mix, lane, there, row, rows, start, stop, width, position, s_band, scale,
                      HAS_VALID, E, CP, BN)  # fmt: skip
            new = tl.maximum(m, x)
            total = total * tl.exp2(m - new) + tl.exp2(x - new)
            m = new
        lse = log_sum(m, total)
        tl.store(lse_at, lse, mask=there)
    for start in range(0, width, BN):
        column = start + tl.arange(0, BN)[None, :]
        x = mixed(S, BAND, VALID, mix, lane, there, row, rows, start, stop, width, position, s_band, scale, HAS_VALID,
                  E, CP, BN)  # fmt: skip
        p = tl.exp2(x - lse[:, None]).to(A.dtype.element_ty)
        tl.store(at + column, p, mask=there[:, None] & (column < width))


@triton.jit(do_not_specialize=VARYING)
def weigh_back(S, BAND, VALID, MIX, A, DA, DBAND, DMIX, s_band, rows, first, keys, width, shift, scale,
               groups: tl.constexpr, CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, EXACT: tl.constexpr,
               E: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One row of a group of heads: the gradient of scores in the place of that of weights (DA), that of the diagonals
    taken off, and this row's part of that of the mixing. Of A, 0 stands where a key is not seen."""
    row, unit = tl.program_id(0), tl.program_id(1)
    head = tl.arange(0, CP)
    there = head < C
    lane = unit * C + head
    at = (lane.to(tl.int64) * rows + row) * width
    position = first + row
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, position + 1)
    VALID += ((unit + shift) // groups).to(tl.int64) * keys
    if CP > 1:
        to, source = tl.arange(0, CP)[:, None], tl.arange(0, CP)[None, :]
        mix_at = MIX + ((unit + shift) % groups) * C * C + source * C + to
        back = tl.load(mix_at, mask=(to < C) & (source < C), other=0.0).to(tl.float32)
        dmix = tl.zeros((CP, CP), tl.float32)
    delta = tl.zeros((CP,), tl.float32)
    for start in range(0, stop, BN):
        column = start + tl.arange(0, BN)
        delta += tl.sum(across(A, at, there, column, width) * across(DA, at, there, column, width), 1)
    for start in range(0, width, BN):
        column = start + tl.arange(0, BN)
        ds = across(A, at, there, column, width) * (across(DA, at, there, column, width) - delta[:, None])
        if CP > 1:
            seen = visible(column, stop, VALID, HAS_VALID)
            x = scores(S, BAND, lane, there, row, rows, start, width, position, seen, s_band, scale, E, BN)
            dmix += product(ds, tl.trans(x), EXACT)
            ds = product(back, ds, EXACT)
        tl.store(DA + at[:, None] + column[None, :], (ds * scale).to(DA.dtype.element_ty),
                 mask=there[:, None] & (column < width)[None, :])  # fmt: skip
        if E > 0 and start + BN > position - E:
            gap = position - column
            near = there[:, None] & ((column < stop) & (gap >= 0) & (gap < E))[None, :]
            band = DBAND + (lane.to(tl.int64) * s_band + row * E)[:, None] + gap[None, :]
            tl.store(band, tl.load(band, mask=near, other=0.0) - ds, mask=near)
    if CP > 1:
        part = (unit * rows + row).to(tl.int64) * C * C + to * C + source
        tl.store(DMIX + part, dmix, mask=(to < C) & (source < C))


@triton.jit
def tile(X, first_row, start, rows, width, VALID, first, keys, CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr,
         MASK: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """M rows of weights and N columns, 0 outside, and with MASK where a query doesn't see a key. `first`: the position
    of row 0."""
    row, column = first_row + tl.arange(0, M), start + tl.arange(0, N)
    mask = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < width))[None, :]
    x = tl.load(X + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)
    if MASK and HAS_VALID:
        seen = visible(column, keys, VALID, HAS_VALID)[None, :]
        if CAUSAL:
            seen = seen & (column[None, :] <= (first + row)[:, None])
        x = tl.where(seen, x, 0.0)
    elif MASK and CAUSAL and start + N > first + first_row:
        # Keys past the last one have weights of 0, and values of 0.
        x = tl.where(column[None, :] <= (first + row)[:, None], x, 0.0)
    return x


@triton.jit(do_not_specialize=VARYING)
def slide(X, T, VALID, OUT, rows, first, keys, width, shift, lanes_before, out_rows, heads: tl.constexpr,
          CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, BACK: tl.constexpr, EXACT: tl.constexpr, C_Q: tl.constexpr,
          SIDE: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """The convolution of rows X: the output's first row stands beside X's row `shift`. With BACK from a' to a. `first`:
    the position of the first row of a', which is masked. lanes_before: those of other blocks."""
    lane = tl.program_id(2)
    begin, start = tl.program_id(1) * BM, tl.program_id(0) * BN
    X += lane.to(tl.int64) * rows * width
    T += ((lane + lanes_before) % heads).to(tl.int64) * C_Q * WIDE * BN
    VALID += ((lane + lanes_before) // heads).to(tl.int64) * keys
    near = tl.arange(0, WIDE)[:, None] * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for a in tl.static_range(C_Q):
        # The kernel's last row is the query itself.
        source = begin + shift + ((C_Q - 1 - a) if BACK else (a - (C_Q - 1)))
        x = tile(X, source, start - SIDE, rows, width, VALID, first, keys, CAUSAL, HAS_VALID, BACK, BM, WIDE)
        acc += product(x, tl.load(T + a * WIDE * BN + near), EXACT)
    row, column = begin + tl.arange(0, BM), start + tl.arange(0, BN)
    if not BACK:
        seen = visible(column, keys, VALID, HAS_VALID)[None, :]
        if CAUSAL:
            seen = seen & (column[None, :] <= (first + row)[:, None])
        acc = tl.where(seen, acc, 0.0)
    to = OUT + lane.to(tl.int64) * out_rows * width + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to, acc.to(OUT.dtype.element_ty), mask=(row < out_rows)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=VARYING)
def slide_taps(X, DY, VALID, DT, rows, first, keys, width, shift, lanes_before, out_rows, heads: tl.constexpr,
               CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, EXACT: tl.constexpr, C_Q: tl.constexpr,
               SIDE: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """The gradient of one of `slide`'s matrices, from BM rows of the output and their gradient DY."""
    a, lane = tl.program_id(0), tl.program_id(2)
    begin = tl.program_id(1) * BM
    X += lane.to(tl.int64) * rows * width
    DY += lane.to(tl.int64) * out_rows * width
    VALID += ((lane + lanes_before) // heads).to(tl.int64) * keys
    source = begin + shift + a - (C_Q - 1)
    stop = width
    if CAUSAL:
        stop = tl.minimum(width, first + begin + BM)
    acc = tl.zeros((WIDE, BN), tl.float32)
    for start in range(0, stop, BN):
        x = tile(X, source, start - SIDE, rows, width, VALID, 0, keys, CAUSAL, HAS_VALID, False, BM, WIDE)
        dy = tile(DY, begin, start, out_rows, width, VALID, first, keys, CAUSAL, HAS_VALID, True, BM, BN)
        acc += product(tl.trans(x), dy, EXACT)
    at = (lane * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * C_Q + a
    near = tl.arange(0, WIDE)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(DT + at * WIDE * BN + near, acc)
