"""ZeroTuning: how much the first token is attended to, set for the heads that profit from it.

1. Every head alone is given a gain above and one below 1 on the first token; it is up-effective or down-effective by
   which of them scores better on the examples than the plain model.
2. The stronger type (the larger sum of improvements) is kept, and of it the best share of heads.
3. One common gain for them is searched on a grid.

The score is the accuracy on labelled examples, or with `mode="entropy"` minus the mean entropy of the answer, which
needs no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.steer.choices import Choice, accuracy, option_entropy
from headwise.steer.method import apply, every_head
from headwise.steer.token_scale import TokenScale

GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
PROBES = (0.6, 1.5)


@dataclass(frozen=True)
class ZeroTuning(TokenScale):
    """A `TokenScale` of the first token whose heads and gain `calibrate` finds. With left padding name the first real
    token by segments, and give that segment."""

    def calibrate(
        self,
        opened: Opened,
        examples: Sequence[Choice],
        mode: Literal["labels", "entropy"] = "labels",
        per: Literal["index", "head"] = "index",
        share: float = 0.5,
        grid: Sequence[float] = GRID,
    ) -> Self:
        """A copy with heads and gain set. `per="index"` takes a head number in all layers as one (the paper's way),
        `per="head"` every (layer, head) by itself, which costs as many times more. `share` of the heads are kept."""
        if mode not in ("labels", "entropy"):
            raise HeadwiseError(f'mode: wanted "labels" or "entropy"; got {mode!r}.')
        if per not in ("index", "head"):
            raise HeadwiseError(f'per: wanted "index" or "head"; got {per!r}.')
        if not 0 < share <= 1:
            raise HeadwiseError(f"share: wanted a number above 0 and at most 1; got {share!r}.")
        score = self.scorer(opened, examples, mode)
        every = every_head(opened)
        groups = (
            [[p for p in every if p[1] == h] for h in sorted({h for _, h in every})]
            if per == "index"
            else [[pair] for pair in every]
        )
        plain = score(replace(self, gain=1.0, heads=None))
        change = {
            gain: [score(replace(self, gain=gain, heads=tuple(group))) - plain for group in groups] for gain in PROBES
        }
        best = max(PROBES, key=lambda gain: sum(max(c, 0.0) for c in change[gain]))
        order = sorted(range(len(groups)), key=lambda n: -change[best][n])
        kept = order[: max(1, round(share * len(groups)))]
        heads = tuple(pair for n in sorted(kept) for pair in groups[n])
        gain = max(grid, key=lambda g: (score(replace(self, gain=g, heads=heads)), -abs(g - 1)))
        return replace(self, gain=gain, heads=heads)

    def scorer(self, opened: Opened, examples: Sequence[Choice], mode: str) -> Callable[[Self], float]:
        """What a setting is worth on the examples; higher is better."""

        def score(method: Self) -> float:
            with apply(opened, method):
                return accuracy(opened, examples) if mode == "labels" else -option_entropy(opened, examples)

        return score
