"""Split softmax: the mass on a span raised or lowered by a power, everything inside and outside in proportion.

With `p = sum_{j in span} a_j`: `a'_j = a_j p^tau / p` inside, `a_j (1 - p^tau) / (1 - p)` outside. tau < 1 raises the
attention to the span, tau > 1 lowers it. Exact without the matrix: a re-weighting of two groups of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from headwise.attention import Edit, Reweight
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, Space, pairs

EPS = 1e-6
"""A query with less mass than this inside or outside of the span is left alone: there is nothing to share out."""


@dataclass(frozen=True)
class SplitSoftmax(Method):
    """Turns the mass p on `segment` into p^tau, in some heads (the contextual ones) and queries (None: all). The form
    is that of the split-softmax literature, which the paper uses for its check with known relevant spans."""

    segment: str = "emphasis"
    tau: float = 1.0
    heads: Heads = None
    queries: str | None = None
    what: ClassVar[str] = "the mass on a span raised to a power"
    space: ClassVar[Space] = {"tau": (1.0, 0.8, 0.6, 0.4, 1.5)}
    paper: ClassVar[Paper] = Paper(
        "Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts", "2503.23306"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0 or math.isinf(self.tau):
            raise HeadwiseError(f"SplitSoftmax(tau=...) must be a number above 0; got {self.tau!r}.")

    def edits(self, opened: Opened) -> list[Edit]:
        if self.tau == 1:
            return []
        groups = (self.segment, "*")
        return [Reweight(self.rule, groups=groups, queries=self.queries, heads=pairs(self.heads, opened))]

    def rule(self, masses: Float[Tensor, "batch heads query 2"]) -> Float[Tensor, "batch heads query 2"]:
        """The weights of the span and of all else."""
        inside, outside = masses.unbind(-1)
        new = inside.clamp(min=EPS) ** self.tau
        weights = masses.clone()
        weights[..., 0] = new / inside.clamp(min=EPS)
        weights[..., 1] = (1 - new) / outside.clamp(min=EPS)
        untouched = (inside < EPS) | (outside < EPS)
        return weights.masked_fill(untouched[..., None], 1.0)
