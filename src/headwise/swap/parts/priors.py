"""What is believed of an edge before queries and keys are looked at: priors over which token a token links to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.attention.call import AttentionCall
from headwise.attention.dense import BLOCKED
from headwise.errors import HeadwiseError
from headwise.swap.parts.positions import Places, Position
from headwise.swap.parts.scores import Score

LogPrior = Callable[[Int[Tensor, "query one"], Int[Tensor, " key"]], Float[Tensor, "query key"]]


class Prior(Position):
    """`s_ij += ln p(i links to j)`, and beside it what `position` does. `log_prior`: a function of positions i and j
    that broadcast, the same for all heads and known up to a constant a row (-inf rules a link out); or another
    position, whose bias it is."""

    def __init__(self, log_prior: LogPrior | Position, position: Position | None = None):
        super().__init__()
        if not callable(log_prior):
            raise HeadwiseError(f"Prior: log_prior is a position or a function of positions; got {log_prior!r}.")
        self.log_prior, self.position = log_prior, position or Position()

    def turn(self, x: Float[Tensor, "batch heads token dim"], places: Places) -> Float[Tensor, "batch heads token dim"]:
        return self.position.turn(x, places)

    def bias(
        self, heads: int, i: Int[Tensor, " query"], j: Int[Tensor, " key"]
    ) -> Float[Tensor, "one #heads query key"] | None:
        if isinstance(self.log_prior, Position):
            mine = self.log_prior.bias(heads, i, j)
        else:
            mine = self.log_prior(i[:, None], j)[None, None]
        other = self.position.bias(heads, i, j)
        return other if mine is None else mine if other is None else mine + other


class GeometricBeta(Score):
    """Scaled dot products with a geometric prior on distance whose rate every query and head infers for itself.

    `p(i links to j | rho) ~ rho^|i-j|`, `rho ~ Beta(a0, b0)`. Mean field, `iterations` times in turn: `A = softmax(s_ij
    + |i-j| l_i)`, `a_i = a0 + sum_j A_ij |i-j|`, `b = b0 + 1`, `l_i = digamma(a_i) - digamma(a_i + b)`, from a = a0 on.
    The score is `s_ij + |i-j| l_i`. It is one of the structures of "Attention: Marginal Probability is All You
    Need?" (arXiv 2304.04556), as that was extended; the updates were derived here.

    `tol` above 0 expands: a query starts with the keys nearer than `start` and doubles that window until what all
    further keys can add, `exp(scale |q_i| max_j |k_j|)` times the rest of the geometric series, is below `tol` of what
    it has. Further keys are left out of everything. All scores are computed all the same: the window says how many are
    needed, and saves nothing here.
    """

    def __init__(self, a0: float = 1.0, b0: float = 1.0, iterations: int = 4, tol: float = 0.0, start: int = 4):
        super().__init__()
        if a0 <= 0 or b0 <= 0 or iterations < 1 or tol < 0 or start < 1:
            raise HeadwiseError(
                f"GeometricBeta: wanted a0, b0 > 0, iterations, start >= 1, tol >= 0; got a0={a0}, b0={b0}, "
                f"iterations={iterations}, start={start}, tol={tol}."
            )
        self.a0, self.b0, self.iterations, self.tol, self.start = a0, b0, iterations, tol, start

    def forward(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch heads key dim"],
        call: AttentionCall,
    ) -> Float[Tensor, "batch heads query key"]:
        s, slope, window = self.expand(q, k, call)
        gap = distance(call)
        s = s + slope * gap
        return s if window is None else s.masked_fill(gap >= window, float("-inf"))

    def expand(
        self, q: Float[Tensor, "batch heads query dim"], k: Float[Tensor, "batch heads key dim"], call: AttentionCall
    ) -> tuple[Tensor, Float[Tensor, "batch heads query one"], Int[Tensor, "batch heads query one"] | None]:
        """The dot products [batch, heads, query, key], every query's slope l_i, and its window (None: all keys)."""
        s, gap = super().forward(q, k, call), distance(call)
        seen = call.mask.dense(call.i, call.j0, call.keys)
        if call.mask.added is not None:
            seen = seen & (call.mask.added > BLOCKED)
        if not self.tol:
            return s, self.slope(s, gap, seen), None
        with torch.no_grad():
            keys = torch.where(seen, k.norm(dim=-1)[:, :, None], 0.0).amax(-1, keepdim=True)
            largest = abs(call.scale) * q.norm(dim=-1, keepdim=True) * keys
            known = largest + (0.0 if call.mask.causal else math.log(2)) - math.log(self.tol)
            window = torch.full_like(s[..., :1], self.start, dtype=torch.long)
            for _ in range(math.ceil(math.log2(max(call.keys / self.start, 1))) + 1):
                inside = seen & (gap < window)
                slope = self.slope(s, gap, inside)
                have = torch.logsumexp((s + slope * gap).masked_fill(~inside, float("-inf")), -1, keepdim=True)
                rest = known + window * slope - torch.log1p(-slope.exp())
                window = torch.where((rest > have) & (window <= gap.max()), 2 * window, window)
        return s, self.slope(s, gap, seen & (gap < window)), window

    def slope(
        self, s: Float[Tensor, "batch heads query key"], gap: Float[Tensor, "query key"], seen: Bool[Tensor, "..."]
    ) -> Float[Tensor, "batch heads query one"]:
        """E[ln rho] of every query."""
        a, b = torch.full_like(s[..., :1], self.a0), torch.full_like(s[..., :1], self.b0 + 1)
        for _ in range(self.iterations):
            slope = torch.digamma(a) - torch.digamma(a + b)
            weights = torch.softmax((s + slope * gap).masked_fill(~seen, torch.finfo(s.dtype).min), -1)
            a = self.a0 + (weights * gap).sum(-1, keepdim=True)
        return torch.digamma(a) - torch.digamma(a + b)

    def flops(self, queries: int, keys: int, heads: int, dim: int) -> int:
        return super().flops(queries, keys, heads, dim) + 6 * self.iterations * queries * keys * heads


def distance(call: AttentionCall) -> Float[Tensor, "query key"]:
    """|i - j| in the calls' numbers."""
    j = torch.arange(call.keys, device=call.i.device) + call.j0
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    return (call.i[:, None] - j).abs().to(dtype)
