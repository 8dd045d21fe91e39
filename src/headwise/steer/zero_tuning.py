"""ZeroTuning: how much the first token is attended to, set for the heads that profit from it.

1. Every head alone is given a gain above and one below 1 on the first token; it is up-effective or down-effective by
   which of them scores better on the examples than the plain model.
2. The stronger type (the larger sum of improvements) is kept, and of it the best share of heads.
3. One common gain for them is searched on a grid.

The score is the accuracy on labelled examples, with `mode="likelihood"` the log-probability of their right answers
(less noise from few examples), or with `mode="entropy"` minus the mean entropy of the answer, which needs no labels.
Step 1 may be had from one pass back instead (ours): a head is up- or down-effective by the sign of the score's slope at
gain 1 (for accuracy, which has none, that of the log-probability).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.steer.choices import Choice, accuracy, likelihood, option_entropy, scored
from headwise.steer.first_token import first_token_slopes
from headwise.steer.method import apply, every_head
from headwise.steer.token_scale import TokenScale

GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
PROBES = (0.6, 1.5)
Mode = Literal["accuracy", "likelihood", "entropy"]
SCORES: dict[str, Callable[[Opened, Sequence[Choice]], float]] = {
    "accuracy": accuracy,
    "likelihood": likelihood,
    "entropy": lambda opened, examples: -option_entropy(opened, examples),
}


@dataclass(frozen=True)
class ZeroTuning(TokenScale):
    """A `TokenScale` of the first token whose heads and gain `calibrate` finds. In a batch that is padded on the left,
    `segments=steer.mark_first(batch)` names each sample's own."""

    def calibrate(
        self,
        opened: Opened,
        examples: Sequence[Choice],
        mode: Mode = "accuracy",
        per: Literal["index", "head"] = "index",
        share: float = 0.5,
        grid: Sequence[float] = GRID,
        probe: Literal["runs", "gradient"] = "runs",
    ) -> Self:
        """A copy with heads and gain set. `per="index"` takes a head number in all layers as one (the paper's way),
        `per="head"` every (layer, head) by itself, which costs as many times more with `probe="runs"` and nothing more
        with `probe="gradient"`. `share` of the heads are kept."""
        if mode not in SCORES:
            raise HeadwiseError(f"mode: wanted one of {', '.join(SCORES)}; got {mode!r}.")
        if per not in ("index", "head"):
            raise HeadwiseError(f'per: wanted "index" or "head"; got {per!r}.')
        if probe not in ("runs", "gradient"):
            raise HeadwiseError(f'probe: wanted "runs" or "gradient"; got {probe!r}.')
        if not 0 < share <= 1:
            raise HeadwiseError(f"share: wanted a number above 0 and at most 1; got {share!r}.")
        if not len(grid):
            raise HeadwiseError("grid: wanted one or more gains to try; got none.")
        every = every_head(opened)
        groups = (
            [[p for p in every if p[1] == h] for h in sorted({h for _, h in every})]
            if per == "index"
            else [[pair] for pair in every]
        )
        if probe == "gradient":
            slope = self.slopes(opened, examples, mode)
            up = [sum(float(slope[pair]) for pair in group) for group in groups]
            change = {1: up, -1: [-x for x in up]}
        else:
            score = self.scorer(opened, examples, mode)
            plain = score(replace(self, gain=1.0, heads=None))
            change = {
                gain: [score(replace(self, gain=gain, heads=tuple(group))) - plain for group in groups]
                for gain in PROBES
            }
        best = max(change.values(), key=lambda one: sum(max(c, 0.0) for c in one))
        order = sorted(range(len(groups)), key=lambda n: -best[n])
        kept = order[: max(1, round(share * len(groups)))]
        tuned = replace(self, heads=tuple(pair for n in sorted(kept) for pair in groups[n]))
        curve = tuned.curve(opened, examples, mode, grid)
        return replace(tuned, gain=max(curve, key=lambda g: (curve[g], -abs(g - 1))))

    def curve(
        self, opened: Opened, examples: Sequence[Choice], mode: Mode = "accuracy", grid: Sequence[float] = GRID
    ) -> dict[float, float]:
        """The score at every gain of the grid, with these heads."""
        score = self.scorer(opened, examples, mode)
        return {gain: score(replace(self, gain=gain)) for gain in grid}

    def slopes(
        self, opened: Opened, examples: Sequence[Choice], mode: Mode = "accuracy"
    ) -> Float[Tensor, "layer head"]:
        """The slope of the mean log-probability of the right option among all (nats; with "entropy" of minus the
        options' entropy) by the log of each head's gain, at gain 1."""
        if not examples or (mode != "entropy" and any(example.gold is None for example in examples)):
            raise HeadwiseError("examples: wanted one or more Choices, with their gold unless mode is entropy.")

        def measure(example: Choice) -> Tensor:
            logp = scored(opened, example).log_softmax(-1)
            return (logp.exp() * logp).sum() if mode == "entropy" else logp[example.gold]

        found = [first_token_slopes(opened, partial(measure, example)) for example in examples]
        return torch.stack(found).mean(0)

    def scorer(self, opened: Opened, examples: Sequence[Choice], mode: Mode) -> Callable[[Self], float]:
        """What a setting is worth on the examples; higher is better."""

        def score(method: Self) -> float:
            with apply(opened, method):
                return SCORES[mode](opened, examples)

        return score
