"""Softmax taken apart: a numerator (the exponential or its Taylor series) over one of several row divisors."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.swap.parts.normalisers import Normaliser, Scored, Seen

Divisor = Literal["sum", "clamp", "detach", "count", "none"]


class Numerator(Normaliser):
    """`a_ij = E(s_ij) / D_i` ("On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective",
    arXiv 2507.23632).

    `function`: E = exp, or "taylor", the first terms of its series, `sum_{n <= order} s^n / n!`. Series of even order
    are positive everywhere; those of odd order are negative far left, where sums of them may vanish.
    `divide`: D = the sum of E over the row; "clamp", the sum or 1 if that is larger; "detach", the sum without its
    gradient; "count", how many keys the row sees; "none", 1.
    `clamp`: exp cuts scores off here where nothing divides by its sum (count, none); inf for no cut.
    """

    def __init__(
        self,
        function: Literal["exp", "taylor"] = "exp",
        divide: Divisor = "sum",
        order: int = 2,
        clamp: float = 5.0,
    ):
        super().__init__()
        if function not in ("exp", "taylor"):
            raise HeadwiseError(f"Numerator: function is 'exp' or 'taylor'; got {function!r}.")
        if divide not in ("sum", "clamp", "detach", "count", "none"):
            raise HeadwiseError(f"Numerator: divide is sum, clamp, detach, count or none; got {divide!r}.")
        if order < 0:
            raise HeadwiseError(f"Numerator: order must be at least 0; got {order}.")
        self.function, self.divide, self.order, self.clamp = function, divide, order, clamp
        self.softmax = function == "exp" and divide == "sum"

    def forward(self, s: Scored, seen: Seen) -> Scored:
        if self.softmax:
            return super().forward(s, seen)
        count = seen.sum(-1, keepdim=True).to(s)
        if self.function == "taylor":
            a = taylor(s.masked_fill(~seen, 0.0), self.order).masked_fill(~seen, 0.0)
            return a / self.divisor(a.sum(-1, keepdim=True), count)
        if self.divide in ("count", "none"):
            return s.clamp(max=self.clamp).exp().masked_fill(~seen, 0.0) / self.divisor(s, count)
        # exp(s) / D as exp(s - top) / (D exp(-top)): the same, and no overflow
        top = s.detach().amax(-1, keepdim=True).clamp(min=0.0)
        a = (s - top).exp().masked_fill(~seen, 0.0)
        return a / self.divisor(a.sum(-1, keepdim=True), count, (-top).exp())

    def divisor(
        self,
        total: Float[Tensor, "*batch one"],
        count: Float[Tensor, "*#batch one"],
        unit: Float[Tensor, "*batch one"] | float = 1.0,
    ) -> Float[Tensor, "*batch one"] | float:
        """D from the row's sum and count; `unit`: what 1 is where the sum was scaled. A row that sees nothing: 1."""
        if self.divide == "none":
            return 1.0
        if self.divide == "count":
            return count.clamp(min=1)
        if self.divide == "clamp":
            return torch.maximum(total, torch.as_tensor(unit).to(total))
        total = total.detach() if self.divide == "detach" else total
        return torch.where(count > 0, total, 1.0)


def taylor(s: Float[Tensor, "..."], order: int) -> Float[Tensor, "..."]:
    """`sum_{n = 0}^{order} s^n / n!`, by Horner's rule."""
    total = torch.ones_like(s)
    for n in range(order, 0, -1):
        total = 1 + s * total / n
    return total


def powers(x: Float[Tensor, "... dim"], order: int) -> Float[Tensor, "... feature"]:
    """The Kronecker powers of x up to `order`, the n-th over sqrt(n!): `powers(x) . powers(y) = taylor(x . y)`. They
    are `sum_n dim^n` wide."""
    found = [torch.ones_like(x[..., :1])]
    for n in range(1, order + 1):
        found.append((found[-1][..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(n))
    return torch.cat(found, -1)
