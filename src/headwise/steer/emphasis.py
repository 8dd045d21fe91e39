"""Emphasis on a span of the prompt: the chosen heads look at everything else less.

`a'_j = a_j / C` inside the span and `alpha a_j / C` outside of it, C the new sum: a score bias of `-log alpha` on the
span. The paper's alpha is 0.01, in heads that are found by trying each on a few examples.
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
from headwise.steer.pattern_mask import Keys, any_keys


@dataclass(frozen=True)
class Emphasis(Method):
    """PASTA: scales the attention to all tokens outside of `segment` by `alpha` and renormalises. `segment` may be any
    form of mask: a segment's name (`Segments.from_characters`), a relative one ("window:8", "same"), bools over keys,
    or a rule `(b, h, i, j)` of query and key."""

    segment: Keys = "emphasis"
    alpha: float = 0.01
    heads: Heads = None
    queries: str | None = None
    what: ClassVar[str] = "emphasis on a span of the prompt"
    space: ClassVar[Space] = {"alpha": (1.0, 0.5, 0.2, 0.1, 0.03, 0.01)}
    paper: ClassVar[Paper] = Paper(
        "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs", "2311.02262"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise HeadwiseError(f"Emphasis(alpha=...) must be above 0 and at most 1; got {self.alpha!r}.")

    def edits(self, opened: Opened) -> list[Edit]:
        if self.alpha == 1:
            return []
        value = -math.log(self.alpha)
        return [ScoreBias(value, keys=any_keys(self.segment), queries=self.queries, heads=pairs(self.heads, opened))]
