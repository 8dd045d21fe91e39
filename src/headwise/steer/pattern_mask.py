"""Pattern injection: a head keeps to a pattern `P(i, j)` of queries and keys, such as "the token before".

- mask: `s_ij` counts only where P holds; within the pattern the weights are the head's own: `a_ij P / sum_j a_ij P`
- fix:  every key of the pattern gets the same, whatever queries and keys say: `P / sum_j P`

A query for which no key of the pattern can be seen attends as if there were no pattern (mask), or to all keys it sees
equally (fix). Which patterns are worth injecting is found by looking (`scan`); here a pattern is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise.attention import Edit, KeyRule, ScoreBias, ScoreMap
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, pairs

Keys = str | Bool[Tensor, "*batch key"] | KeyRule
"""Any form of mask: a segment (also "previous", "next", "self", "first", "same", "window:8", "offset:-3"), bools over
keys, or a rule `(b, h, i, j)` of query and key."""
RAISED = 256.0
"""What the pattern's scores are raised by: e^-256 is 0 beside 1, and a score of 256 + s still knows s to 2e-5. Raised
and not blocked, a query that sees no key of the pattern keeps its weights."""


@dataclass(frozen=True)
class Offset:
    """The key `by` places after the query (before it, where negative)."""

    by: int

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j - i == self.by


@dataclass(frozen=True, eq=False)
class MatchingTokens:
    """Other places of the same token. `ids` are the prompt's; tokens in `exclude` (special ones, say) and those that
    are generated later match nothing."""

    ids: Int[Tensor, "*batch token"]
    exclude: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Tensor) or self.ids.ndim not in (1, 2) or self.ids.is_floating_point():
            raise HeadwiseError(
                f"MatchingTokens(ids=...) must be token ids [token] or [batch, token]; got {self.ids!r}."
            )

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ids = self.ids.to(i.device)
        ids = ids[None] if ids.ndim == 1 else ids
        last = ids.shape[1] - 1
        row = b * len(ids) // b.numel()  # beams of one sample stand one after the other
        own = ids[row, i.clamp(max=last)]
        given = ~torch.isin(own, torch.tensor(self.exclude, dtype=ids.dtype, device=i.device))
        return (own == ids[row, j.clamp(max=last)]) & given & (i != j) & (i <= last) & (j <= last)


@dataclass(frozen=True, eq=False)
class PatternMask(Method):
    """One pattern, in `heads` (None: all), for the queries of a segment (None: all). Several are stacked, each in heads
    of its own. The paper masks same tokens and same sentences ("same", the sentences named as segments) and fixes the
    token before and after; it trains the model afterwards, which this doesn't: look at what it costs
    (`study.evaluate`)."""

    pattern: Keys
    heads: Heads = None
    mode: Literal["mask", "fix"] = "mask"
    queries: str | None = None
    what: ClassVar[str] = "heads that keep to a pattern"
    paper: ClassVar[Paper] = Paper(
        "Human Guided Exploitation of Interpretable Attention Patterns in Summarization and Topic Segmentation",
        "2112.05364",
    )

    def lacks(self, opened: Opened) -> str | None:
        keys = any_keys(self.pattern)
        later = keys == "next" or (isinstance(keys, Offset) and keys.by > 0)
        if later and any(getattr(site.module, "is_causal", False) for site in opened.sites if site.kind == "self"):
            return "attention to later tokens, where the pattern is"
        return None

    def edits(self, opened: Opened) -> list[Edit]:
        heads = pairs(self.heads, opened)
        raised = ScoreBias(RAISED, keys=any_keys(self.pattern), queries=self.queries, heads=heads)
        flat: list[Edit] = [ScoreMap(torch.zeros_like, queries=self.queries, heads=heads)]
        return [*(flat if self.mode == "fix" else []), raised]


def any_keys(keys: Keys) -> Keys:
    """Keys as a ScoreBias takes them: "offset:-3" becomes a rule."""
    found = re.fullmatch(r"offset:([+-]?\d+)", keys) if isinstance(keys, str) else None
    return Offset(int(found[1])) if found else keys
