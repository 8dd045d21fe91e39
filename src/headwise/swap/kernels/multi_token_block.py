"""One block of multi-token attention: some rows of some groups of heads, from scores to what multiplies the values, and
back. The backward makes the weights anew.

A lane is a head of a sample. Weights that are convolved need those of `c_q - 1` rows before the block's, which are made
for this block too; gradients are sums over blocks, as softmax is linear in the gradient of its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import triton
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from headwise.swap.kernels.multi_token_features import STEP
from headwise.swap.kernels.multi_token_kernels import slide, slide_taps, weigh, weigh_back

PLACES, LEAST = 2**27, 512
"""Query-key pairs of all heads in one block, but at least so many rows of a group."""
SIDE, WIDE, BM, BN = 16, 64, 64, 32
"""The convolution makes BN keys of BM rows from WIDE keys, SIDE of them before the first."""

Matrix = Float[Tensor, "lane row key"]


@dataclass
class Given:
    """A call's tensors and settings. q has c_q - 1 rows of zeros in front; keys of features and v are padded."""

    q: Float[Tensor, "lane padded_query dim"]
    features: Float[Tensor, "lane padded_key feature"]
    v: Float[Tensor, "lane padded_key value_dim"]
    band: Float[Tensor, "lane query reach"] | None
    pre: Float[Tensor, "group out in"] | None
    taps: Float[Tensor, "head c_q wide narrow"] | None
    post: Float[Tensor, "group out in"] | None
    back: Float[Tensor, "head c_q wide narrow"] | None
    valid: UInt8[Tensor, "batch key"] | None
    scale: float
    causal: bool
    offset: int
    queries: int
    keys: int
    heads: int
    groups: int

    def __post_init__(self) -> None:
        self.lse = torch.empty(len(self.q), self.queries, dtype=torch.float32, device=self.q.device)
        self.each = self.heads // self.groups  # heads in a group
        self.halo = 0 if self.taps is None else self.taps.shape[1] - 1
        self.exact = self.q.dtype == torch.float32
        per_row = self.each * self.features.shape[1]
        # What a causal block wastes on keys after its rows grows with its rows; the sums over blocks with their number.
        rows = max(1024, self.queries // 16) if self.causal else self.queries
        self.height = max(BM, min(self.queries, max(LEAST, min(rows, PLACES // per_row))) // BM * BM)
        self.width = max(1, PLACES // (self.height * per_row)) * self.each

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """Those that have gradients."""
        return ((field.name, getattr(self, field.name)) for field in fields(self)[:7])

    def lanes(self) -> Iterator[slice]:
        return (slice(n, min(n + self.width, len(self.q))) for n in range(0, len(self.q), self.width))

    def rows(self) -> Iterator[tuple[int, int]]:
        return ((n, min(n + self.height, self.queries)) for n in range(0, self.queries, self.height))


class Block:
    """Rows from `start` to `stop`, and before them those that the convolution of weights reaches."""

    def __init__(self, given: Given, lanes: slice, start: int, stop: int):
        self.given, self.part, self.start, self.stop = given, lanes, start, stop
        self.low, self.count = max(0, start - given.halo), lanes.stop - lanes.start
        self.height, self.width = stop - self.low, given.features.shape[1]
        if given.causal:
            self.width = min(self.width, triton.cdiv(given.offset + stop, STEP) * STEP)
        self.values, self.features = (x[lanes, : self.width] for x in (given.v, given.features))
        self.rows = slice(self.low, stop)
        shape, q = (self.count, self.height, given.features.shape[2]), given.q[lanes, self.low :]
        self.queries = q.as_strided(shape, q.stride()).contiguous()  # neighbouring rows, one after another
        self.scores = exact(self.queries, self.features.mT)

    def output(self) -> Float[Tensor, "lane row value_dim"]:
        self.weigh(again=False)
        return self.mixed @ self.values

    def weigh(self, again: bool) -> None:
        """The weights `mixed`, which multiply the values, and those they are made from."""
        given, lse = self.given, self.given.lse[self.part, self.rows]
        self.weights = self.values.new_empty(self.scores.shape)
        weigh[self.grid](
            self.scores, self.band(given.band), self.valid, self.pre, lse, self.weights, self.step, given.queries,
            *self.numbers, AGAIN=again, **self.kinds,
        )  # fmt: skip
        self.slid = self.weights if given.taps is None else self.convolved(self.weights, given.taps, back=False)
        self.mixed = self.slid if given.post is None else self.mix(self.mixing, self.slid)

    def back(self, do: Float[Tensor, "lane row value_dim"], grads: dict[str, Tensor]) -> None:
        """Adds this block's part to the gradients."""
        given, lanes = self.given, self.part
        self.weigh(again=True)
        add_product(grads["v"][lanes, : self.width], self.mixed.mT, do)
        d = do @ self.values.mT
        if given.post is not None:
            # A product a row: one of all rows would be a sum of millions of terms, by one processor.
            d_rows, rows = (x.unflatten(0, (-1, given.each)).transpose(1, 2) for x in (d, self.slid))
            found = exact(d_rows.flatten(0, 1), rows.flatten(0, 1).mT).unflatten(0, (-1, self.stop - self.start))
            add_rows(grads["post"], self.groups, found.sum(1))
            d = self.mix(self.mixing.mT, d)
        if given.taps is not None:
            self.taps_back(d, grads["taps"])
            assert given.back is not None
            d = self.convolved(d, given.back, back=True)
        parts = d.new_empty(0) if given.pre is None else d.new_empty(
            (self.count // given.each, self.height, given.each, given.each), dtype=torch.float32
        )  # fmt: skip
        weigh_back[self.grid](
            self.scores, self.band(given.band), self.valid, self.pre, self.weights, d, self.band(grads["band"]), parts,
            self.step, *self.numbers, EXACT=given.exact, **self.kinds,
        )  # fmt: skip
        if given.pre is not None:
            add_rows(grads["pre"], self.groups, parts.sum(1))
        add_product(grads["features"][lanes, : self.width], d.mT, self.queries)
        dq, size = grads["q"][lanes, self.low :], given.q.shape[2]
        for a, part in enumerate((d @ self.features).split(size, 2)):
            dq[:, a : a + self.height] += part

    def convolved(self, x: Matrix, taps: Tensor, back: bool) -> Matrix:
        rows = self.height if back else self.stop - self.start
        out = x.new_empty(self.count, rows, self.width)
        slide[(triton.cdiv(self.width, BN), triton.cdiv(rows, BM), self.count)](
            x, taps, self.valid, out, *self.slide_numbers(x, rows, back), BACK=back, **self.slide_kinds
        )
        return out

    def taps_back(self, d: Matrix, grad: Float[Tensor, "head c_q wide narrow"]) -> None:
        rows, heads = self.stop - self.start, self.given.heads
        parts = triton.cdiv(rows, BM)
        found = torch.empty((self.count, parts, *grad.shape[1:]), dtype=torch.float32, device=d.device)
        slide_taps[(grad.shape[1], parts, self.count)](
            self.weights, d, self.valid, found, *self.slide_numbers(self.weights, rows, False), **self.slide_kinds
        )
        lane = torch.arange(self.part.start, self.part.stop, device=d.device)
        add_rows(grad, lane % heads, found.sum(1))

    def mix(self, weight: Float[Tensor, "unit out in"], x: Matrix) -> Matrix:
        return (weight @ x.reshape(len(weight), self.given.each, -1)).view_as(x)

    @property
    def groups(self) -> Int[Tensor, " unit"]:
        """The group of every unit, that is a group's heads in a sample."""
        first, last = (n // self.given.each for n in (self.part.start, self.part.stop))
        return torch.arange(first, last, device=self.values.device) % self.given.groups

    @property
    def mixing(self) -> Float[Tensor, "unit out in"]:
        assert self.given.post is not None
        return self.given.post.to(self.values.dtype)[self.groups]

    def band(self, x: Float[Tensor, "lane query reach"] | None) -> Tensor:
        return self.scores if x is None else x[self.part, self.rows]

    # What the kernels are told; a tensor they don't read is any.

    @property
    def step(self) -> int:
        return 0 if self.given.band is None else self.given.band.stride(0)

    @property
    def valid(self) -> Tensor:
        return self.values if self.given.valid is None else self.given.valid

    @property
    def pre(self) -> Tensor:
        return self.values if self.given.pre is None else self.given.pre

    @property
    def each(self) -> int:
        """Heads that are weighed together."""
        return 1 if self.given.pre is None else self.given.each

    @property
    def grid(self) -> tuple[int, int]:
        return self.height, self.count // self.each

    @property
    def numbers(self) -> tuple[int | float, ...]:
        given = self.given
        return (self.height, given.offset + self.low, given.keys, self.width, self.part.start // self.each, given.scale)

    @property
    def kinds(self) -> dict[str, int | bool]:
        given = self.given
        padded = 1 if given.pre is None else max(16, triton.next_power_of_2(self.each))
        return dict(
            groups=given.heads // self.each, CAUSAL=given.causal, HAS_VALID=given.valid is not None,
            E=0 if given.band is None else given.band.shape[2], C=self.each, CP=padded, BN=2048 // padded, num_warps=4,
        )  # fmt: skip

    def slide_numbers(self, x: Matrix, rows: int, back: bool) -> tuple[int, ...]:
        given, shift = self.given, self.start - self.low
        return (x.shape[1], given.offset + self.start, given.keys, self.width, -shift if back else shift,
                self.part.start, rows)  # fmt: skip

    @property
    def slide_kinds(self) -> dict[str, int | bool]:
        given = self.given
        assert given.taps is not None
        return dict(
            heads=given.heads, CAUSAL=given.causal, HAS_VALID=given.valid is not None, EXACT=given.exact,
            C_Q=given.taps.shape[1], SIDE=SIDE, WIDE=WIDE, BM=BM, BN=BN,
        )  # fmt: skip


def exact(x: Float[Tensor, "lane row inner"], y: Float[Tensor, "lane inner key"]) -> Matrix:
    """The product in float32, also of numbers of 16 bits."""
    return torch.bmm(x, y) if x.dtype == torch.float32 else torch.bmm(x, y, out_dtype=torch.float32)


def add_product(to: Matrix, x: Float[Tensor, "lane row inner"], y: Float[Tensor, "lane inner key"]) -> None:
    """`to += x @ y`, in float32."""
    if x.dtype == torch.float32:
        to.baddbmm_(x, y)
    else:
        torch.baddbmm(to, x, y, out_dtype=torch.float32, out=to)


def add_rows(to: Float[Tensor, "place *rest"], places: Int[Tensor, " row"], x: Float[Tensor, "row *rest"]) -> None:
    """`to[places] += x`, of equal places in one order: the same result twice."""
    chosen = torch.arange(len(to), device=to.device)[:, None] == places
    to += (chosen.float() @ x.flatten(1)).view_as(to)
