"""More or less attention for a segment, all other weights keeping their proportions.

`a'_j = g a_j / (1 + (g - 1) m)` for keys j of the segment with mass m, `a_j / (1 + (g - 1) m)` for the others: a score
bias of `log g` on the segment. On the first token, where most heads put most of their attention, one number flattens
(g > 1) or sharpens (g < 1) the attention over all that follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from headwise.attention import Edit, ScoreBias
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, Space, pairs

DROPPED = -1e4
"""The bias that stands for a gain of 0: the segment gets nothing, and a query that sees nothing else keeps it."""


@dataclass(frozen=True)
class TokenScale(Method):
    """Multiplies the attention to `segment` by `gain` and renormalises, in some layers, heads and queries (None: all).

    A gain of 1 changes nothing; gains multiply when methods are stacked; 0 takes the segment away, except from a query
    that sees nothing else."""

    segment: str = "first"
    gain: float = 1.0
    heads: Heads = None
    queries: str | None = None
    what: ClassVar[str] = "more or less attention to a segment"
    space: ClassVar[Space] = {"gain": (1.0, 0.25, 0.5, 0.75, 1.5, 2.0, 3.0, 4.0)}
    paper: ClassVar[Paper] = Paper(
        "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
        "2505.11739",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gain >= 0 or math.isinf(self.gain):
            raise HeadwiseError(f"{type(self).__name__}(gain=...) must be a number of at least 0; got {self.gain!r}.")

    def edits(self, opened: Opened) -> list[Edit]:
        if self.gain == 1:
            return []
        value = math.log(self.gain) if self.gain else DROPPED
        return [ScoreBias(value, keys=self.segment, queries=self.queries, heads=pairs(self.heads, opened))]
