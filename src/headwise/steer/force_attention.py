"""Forced attention: a head's row of weights replaced by a given one, `a'_j = w_j`, w equal on the targets.

All scores of the row are made equal, and those of the targets raised until nothing else counts: no score of the model's
own is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from headwise.attention import Edit, ScoreBias, ScoreMap
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, pairs

RAISED = 100.0
"""e^-100 is 0 beside 1 in float32, and 100 + log w still knows w to five digits."""


@dataclass(frozen=True)
class ForceAttention(Method):
    """Heads attend to the tokens of `targets` (positions) with the weights `weights` (None: equally) from the queries
    of `queries` (None: all). The paper repairs a task so: heads that inhibit what they attend to are made to attend
    to the wrong answers. A query that sees no target yet attends to all it sees equally. Positions are those of the
    rows that the model is given, padding included: prompts of different lengths are steered one by one."""

    targets: tuple[int, ...]
    heads: Heads = None
    queries: str | None = None
    weights: tuple[float, ...] | None = None
    what: ClassVar[str] = "a row of attention replaced by a given one"
    paper: ClassVar[Paper] = Paper("Circuit Component Reuse Across Tasks in Transformer Language Models", "2310.08744")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets or len(set(self.targets)) != len(self.targets) or min(self.targets) < 0:
            raise HeadwiseError(
                f"ForceAttention(targets=...) must be different positions from 0 on; got {self.targets!r}."
            )
        if self.weights is not None and not (
            len(self.weights) == len(self.targets) and all(0 < w < math.inf for w in self.weights)
        ):
            raise HeadwiseError(
                f"ForceAttention(weights=...) must be one number above 0 for each of {len(self.targets)} targets; got "
                f"{self.weights!r}."
            )

    def edits(self, opened: Opened) -> list[Edit]:
        chosen = pairs(self.heads, opened)
        row = torch.zeros(max(self.targets) + 1)
        row[list(self.targets)] = RAISED + torch.tensor(self.weights or [1.0] * len(self.targets)).log()
        return [
            ScoreMap(torch.zeros_like, queries=self.queries, heads=chosen),
            ScoreBias(1.0, keys=row, queries=self.queries, heads=chosen),
        ]
