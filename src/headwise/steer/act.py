"""ACT: attention sinks behind the first token shrunk, and what they free given to the other tokens.

Per head, `m_k` is the mean weight of key k over the queries that can see it, and S the keys with `m_k` above a
threshold, the first token excepted. With `s_i = sum_{k in S} a_ik` every row becomes `beta a_ik` for k in S and
`a_ik (1 - beta s_i) / (1 - s_i)` for all other keys: rows still sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention import Edit, Received, Reweight, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.choices import Choice, accuracy
from headwise.steer.method import Heads, Method, apply, every_head, pairs

Sinks = tuple[tuple[int, int, tuple[int, ...]], ...]
EPS = 1e-6
"""A row with less than this outside of the sinks is left as it is."""


@dataclass(frozen=True)
class ACT(Method):
    """`prepare(opened, batch)` finds the sinks of a prompt: they stay the same while the model goes on from it.

    `rule="absolute"`: a key is a sink when its mean weight is above `threshold` (the released code's 0.1);
    `"relative"`: above `alpha / n` of n tokens (the paper's form). `min_queries`: keys fewer queries see are no sinks
    (the last tokens, whose mean is noise; 1 is the released code's way). Without `heads` all are changed but those of
    the first two layers and the last."""

    beta: float = 0.4
    threshold: float = 0.1
    rule: Literal["absolute", "relative"] = "absolute"
    alpha: float = 5.0
    min_queries: int = 8
    heads: Heads = None
    sinks: Sinks | None = None
    """(layer, head, positions) of the heads that have any, from `prepare`."""
    what: ClassVar[str] = "sinks behind the first token shrunk"
    paper: ClassVar[Paper] = Paper(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration",
        "2406.15765",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise HeadwiseError(f"ACT(beta=...) must be from 0 to 1; got {self.beta!r}.")
        if self.rule not in ("absolute", "relative"):
            raise HeadwiseError(f'ACT(rule=...) must be "absolute" or "relative"; got {self.rule!r}.')
        if not self.threshold > 0 or not self.alpha > 0 or self.min_queries < 1:
            raise HeadwiseError(
                f"ACT wants threshold= and alpha= above 0 and min_queries= of at least 1; got {self.threshold!r}, "
                f"{self.alpha!r} and {self.min_queries!r}."
            )

    def chosen(self, opened: Opened) -> list[tuple[int, int]]:
        given = pairs(self.heads, opened)
        if given is not None:
            return given
        every = every_head(opened)
        last = max(layer for layer, _ in every)
        return [(layer, head) for layer, head in every if 2 <= layer < last]

    def prepare(self, opened: Opened, batch: Mapping[str, Any]) -> Self:
        """A copy that knows the sinks of this prompt (one sample), found in one forward pass."""
        ids = batch["input_ids"]
        if len(ids) != 1:
            raise HeadwiseError(f"ACT.prepare wants one prompt, as sinks differ between them; got {len(ids)}.")
        chosen = self.chosen(opened)
        layers = tuple(sorted({layer for layer, _ in chosen}))
        if not layers:
            return replace(self, sinks=())
        stream = "text" if "text" in opened.streams else opened.streams[0]
        reading = Received(layers=layers, stream=stream)
        with attend(opened, readings=[reading]) as run, torch.no_grad():
            opened.model(**batch)
        node = run.tree[stream].isel(sample=0)
        visible = node["received_visible"]
        mean = node["received"] / visible.clip(min=1)
        limit = self.threshold if self.rule == "absolute" else self.alpha / ids.shape[1]
        hit = (mean > limit) & (visible >= self.min_queries) & (mean["key"] > 0)
        found = [(a, h, tuple(hit["key"].values[hit.sel(layer=a, head=h).values].tolist())) for a, h in chosen]
        return replace(self, sinks=tuple((a, h, tuple(map(int, keys))) for a, h, keys in found if keys))

    def edits(self, opened: Opened) -> list[Edit]:
        if self.beta == 1:
            return []
        if self.sinks is None:
            raise HeadwiseError(
                "ACT wants to see the prompt first: give apply the method ACT().prepare(opened, batch)."
            )
        # Heads of a layer with the same sinks are one edit.
        alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for layer, head, keys in self.sinks:
            alike.setdefault((layer, keys), []).append(head)
        edits: list[Edit] = []
        for (layer, keys), heads in alike.items():
            members = torch.zeros(max(keys) + 1, dtype=torch.bool)
            members[list(keys)] = True
            edits.append(Reweight(self.calibrated, groups=(members, "*"), layer=layer, heads=heads))
        return edits

    def calibrated(self, masses: Float[Tensor, "batch heads query 2"]) -> Float[Tensor, "batch heads query 2"]:
        """The weights of the sinks and of all else."""
        sinks, others = masses.unbind(-1)
        weights = torch.stack(
            [torch.full_like(sinks, self.beta), 1 + (1 - self.beta) * sinks / others.clamp(min=EPS)], -1
        )
        return weights.masked_fill((others < EPS)[..., None], 1.0)

    def calibrate(self, opened: Opened, examples: Sequence[Choice], min_gain: float = 0.0) -> Self:
        """A copy for the heads that, changed alone, raise the accuracy on the examples by more than `min_gain`. One
        evaluation for every head: as many passes as heads times examples."""
        plain = accuracy(opened, examples)
        kept = []
        for pair in self.chosen(opened):
            alone = replace(self, heads=(pair,), sinks=None)
            if sum(alone.right(opened, example) for example in examples) / len(examples) > plain + min_gain:
                kept.append(pair)
        if not kept:
            raise HeadwiseError("ACT.calibrate: no head raises the accuracy on these examples when changed alone.")
        return replace(self, heads=tuple(kept), sinks=None)

    def right(self, opened: Opened, example: Choice) -> float:
        """1 where the method gives the example's right answer, else 0."""
        ready = self.prepare(opened, opened.encode(example.prompt))
        with apply(opened, ready):
            return accuracy(opened, [example])
