"""ACT: attention sinks behind the first token shrunk, and what they free given to the other tokens.

Per head, `m_k` is the mean weight of key k over the queries that can see it, and S the keys with `m_k` above a
threshold, the first token excepted. With `s_i = sum_{k in S} a_ik` every row becomes `beta a_ik` for k in S and
`a_ik (1 - beta s_i) / (1 - s_i)` for all other keys: rows still sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention import Edit, Received, Reweight, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.choices import Choice, accuracy, option_logprobs, scored
from headwise.steer.method import Heads, Method, apply, every_head, pairs

Sinks = tuple[tuple[int, int, tuple[int, ...]], ...]
EPS = 1e-6
"""A row with less than this outside of the sinks is left as it is."""


@dataclass(frozen=True)
class ACT(Method):
    """`prepare(opened, batch)` finds the sinks of a prompt: they stay the same while the model goes on from it.

    `rule="absolute"`: a key is a sink when its mean weight is above `threshold` (the released code's 0.1);
    `"relative"`: above `alpha / n` of n tokens (the paper's form). `min_queries`: keys fewer queries see are no sinks
    (the last tokens, whose mean is noise; 1 is the released code's way). `spared="token"` never counts the first token
    as a sink; `"sink"`, the released code's way, spares each head's first sink, whatever token it is. Without `heads`
    all are changed but those of the first two layers and the last."""

    beta: float = 0.4
    threshold: float = 0.1
    rule: Literal["absolute", "relative"] = "absolute"
    alpha: float = 5.0
    min_queries: int = 8
    spared: Literal["token", "sink"] = "token"
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
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise HeadwiseError(f"ACT(beta=...) must be from 0 to 1; got {self.beta!r}.")
        if any(not keys or min(keys) < 0 for _, _, keys in self.sinks or ()):
            raise HeadwiseError(f"ACT(sinks=...) must give each head positions from 0 on; got {self.sinks!r}.")
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
        ids = batch.get("input_ids", ())
        if len(ids) != 1:
            raise HeadwiseError(
                f'ACT.prepare wants "input_ids" of one prompt, as sinks differ between them; got {len(ids)}.'
            )
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
        seen = visible > 0  # padding is not
        count = seen.any([dim for dim in seen.dims if dim != "key"]).sum().item()
        limit = self.threshold if self.rule == "absolute" else self.alpha / count
        hit = (mean > limit) & (visible >= self.min_queries) & seen
        if self.spared == "token":
            hit = hit & (mean["key"] > mean["key"].where(seen).min("key"))
        found = []
        for layer, head in chosen:
            keys = hit["key"].values[hit.sel(layer=layer, head=head).values].tolist()
            keys = keys[1:] if self.spared == "sink" else keys
            if keys:
                found.append((layer, head, tuple(map(int, keys))))
        return replace(self, sinks=tuple(found))

    def edits(self, opened: Opened) -> list[Edit]:
        if self.beta == 1:
            return []
        if self.sinks is None:
            raise HeadwiseError(
                "ACT wants to see the prompt first: give apply the method ACT().prepare(opened, batch)."
            )
        return self.reweights(self.sinks)

    def reweights(self, sinks: Sinks, strength: Float[Tensor, "layer head"] | None = None) -> list[Edit]:
        """The edits; with `strength` 0 a head is as it was, with 1 it is calibrated. Heads of a layer with the same
        sinks are one edit."""
        alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for layer, head, keys in sinks:
            alike.setdefault((layer, keys), []).append(head)
        edits: list[Edit] = []
        for (layer, keys), heads in alike.items():
            members = torch.zeros(max(keys) + 1, dtype=torch.bool)
            members[list(keys)] = True
            rule = self.calibrated if strength is None else partial(self.partly, strength[layer, heads])
            edits.append(Reweight(rule, groups=(members, "*"), layer=layer, heads=heads))
        return edits

    def calibrated(self, masses: Float[Tensor, "batch heads query 2"]) -> Float[Tensor, "batch heads query 2"]:
        """The weights of the sinks and of all else."""
        sinks, others = masses.unbind(-1)
        weights = torch.stack(
            [torch.full_like(sinks, self.beta), 1 + (1 - self.beta) * sinks / others.clamp(min=EPS)], -1
        )
        return weights.masked_fill((others < EPS)[..., None], 1.0)

    def partly(
        self, strength: Float[Tensor, " heads"], masses: Float[Tensor, "batch heads query 2"]
    ) -> Float[Tensor, "batch heads query 2"]:
        """The way from unchanged weights to calibrated ones, gone as far as `strength` says."""
        return 1 + strength[:, None, None] * (self.calibrated(masses) - 1)

    def calibrate(
        self,
        opened: Opened,
        examples: Sequence[Choice],
        min_gain: float = 0.0,
        by: Literal["accuracy", "gradient"] = "accuracy",
    ) -> Self:
        """A copy for the heads that help on the examples by more than `min_gain`.

        `by="accuracy"`, the paper's way: heads that, changed alone, raise the accuracy; one evaluation for every head
        (given up when it can no longer win), so up to heads times examples passes. `by="gradient"`, ours: heads whose
        strength, at 0, has a slope of the right answer's mean log-probability (nats) above it; one pass forward and one
        back for every example."""
        if by not in ("accuracy", "gradient"):
            raise HeadwiseError(f'by: wanted "accuracy" or "gradient"; got {by!r}.')
        if by == "gradient":
            slope = self.slopes(opened, examples)
            kept = [pair for pair in self.chosen(opened) if slope[pair] > min_gain]
        else:
            wanted = (accuracy(opened, examples) + min_gain) * len(examples)
            kept = [pair for pair in self.chosen(opened) if self.beats(opened, examples, pair, wanted)]
        if not kept:
            raise HeadwiseError(f"ACT.calibrate: no head raises the {by} on these examples when changed alone.")
        return replace(self, heads=tuple(kept), sinks=None)

    def beats(self, opened: Opened, examples: Sequence[Choice], head: tuple[int, int], wanted: float) -> bool:
        """Whether with this head alone more than `wanted` of the examples are right."""
        alone, right = replace(self, heads=(head,), sinks=None), 0.0
        for number, example in enumerate(examples):
            if right + len(examples) - number <= wanted:
                return False
            right += alone.right(opened, example)
        return right > wanted

    def slopes(self, opened: Opened, examples: Sequence[Choice]) -> Float[Tensor, "layer head"]:
        """Slope at 0 of the right answer's log-probability among the options, by each head's strength."""
        if not examples or any(example.gold is None for example in examples):
            raise HeadwiseError("examples: wanted one or more Choices whose gold is known.")
        every = every_head(opened)
        shape = [1 + max(column) for column in zip(*every, strict=True)]
        total = torch.zeros(shape)
        for example in examples:
            found = self.prepare(opened, opened.encode(example.prompt)).sinks
            if not found:
                continue
            strength = torch.zeros(shape, device=opened.device, requires_grad=True)
            with torch.enable_grad(), attend(opened, edits=self.reweights(found, strength)):
                gold = scored(opened, example).log_softmax(-1)[example.gold]
            total += torch.autograd.grad(gold, strength)[0].cpu()
        return total / len(examples)

    def right(self, opened: Opened, example: Choice) -> float:
        """1 where the method gives the example's right answer, else 0."""
        ready = self.prepare(opened, opened.encode(example.prompt))
        with apply(opened, ready):
            return float(int(option_logprobs(opened, example).argmax()) == example.gold)
