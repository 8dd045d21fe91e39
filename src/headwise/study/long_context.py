"""Can it be known, from two moments of the keys, which heads need the far context for a token?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from headwise.attention import Reweight, attend
from headwise.attention.engine import force_path
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments, open_model
from headwise.paper import Paper
from headwise.scan.key_moments import KeyMoments
from headwise.scan.long_context import TINY, LongContextHeads, kind, share
from headwise.scan.needles import haystack
from headwise.scan.needs import quiet
from headwise.scan.question import Prompt
from headwise.scan.tokens import random_tokens
from headwise.study.finding import Finding
from headwise.study.registry import study

PAPER = Paper("Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification", "2502.09647")
ASKED = LongContextHeads(sink=16, local=128, queries=128)
Decisions = Float[np.ndarray, "layer head query"]


@study(
    "long_context_prediction",
    paper=PAPER,
    room="scan",
    claim="Some heads are always local and others switch with the token; two moments of the keys tell when.",
)
def long_context_prediction(
    model: Any = "zoo:llm", question: LongContextHeads = ASKED, length: int = 2048, seed: int = 0
) -> Finding:
    """On two texts (each the test of what the other one calibrates). The estimate has its moments from the text itself,
    from the other text or from random words; the rule it must beat labels whole heads, those with the smallest share on
    the other text as local, as many as the estimate finds local decisions."""
    opened = model if isinstance(model, Opened) else open_model(model)
    texts = [look(opened, ids, question) for ids in passages(opened, 2, length)]
    random = look(opened, random_tokens(opened, 1, length, seed)[0], question)
    rows, far, correlation = [], [], []
    for text, other in zip(texts, texts[::-1], strict=True):
        estimates = {
            "own": text.estimate(text.moments),
            "other_text": text.estimate(other.moments),
            "random_words": text.estimate(random.moments),
        }
        row = {name: float((text.long == said).mean()) for name, said in estimates.items()}
        sparsity = 1 - float(estimates["own"].mean())
        row["static"] = float((text.long == (other.rank(text.far.shape) >= sparsity)).mean())
        rows.append(row | {"local_own": sparsity, "local_oracle": 1 - float(text.long.mean())})
        far.append(text.far)
        correlation.append(text.correlation)
    long = np.mean([text.long.mean(-1) for text in texts], 0)
    kinds = [kind(share) for share in long.ravel()]
    shares = {name: kinds.count(name) / len(kinds) for name in ("always local", "switching", "always long")}
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    good = float((np.mean(correlation, 0) > 0.9).mean())
    holds = min(shares["always local"], shares["switching"]) >= 0.05 and good > 0.5
    holds = holds and mean["own"] - mean["static"] >= 0.05
    return Finding(
        measured={
            "heads": shares,
            "far_share_of_heads": np.quantile(np.mean(far, 0).mean(-1), [0, 0.25, 0.5, 0.75, 1]),
            "correlation_median": np.median(correlation),
            "correlation_above_0.9": good,
            "accuracy": mean,
            "texts": rows,
        },
        expected=(
            "At least 5% of heads always local and 5% switching; a correlation of estimated and true log A_far above "
            "0.9 in most heads; 5 points more right decisions than the static rule at equal sparsity."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"{shares['always local']:.0%} of heads are always local, {shares['switching']:.0%} switch; the "
            f"correlation is above 0.9 in {good:.0%}; {mean['own']:.1%} of decisions are right (with moments of random "
            f"words {mean['random_words']:.1%}), {mean['static']:.1%} by the static rule (tau {question.tau}, window "
            f"{question.local}, {length} tokens)."
        ),
        model=opened.name,
        seeds=[seed],
    )


@study(
    "long_context_perplexity",
    paper=PAPER,
    room="scan",
    claim="Most attention decisions can be local without harm if each token decides, not each head.",
)
def long_context_perplexity(
    model: Any = "zoo:llm",
    question: LongContextHeads = ASKED,
    length: int = 2048,
    levels: Sequence[float] = (0.5, 0.7, 0.8, 0.9),
    seed: int = 0,
) -> Finding:
    """Loss on the last tokens of two texts with a share of all (layer, head, token) decisions made local: the far keys
    get nothing, the rest is renormalised. Every criterion makes the same share local: those with the smallest far mass
    (oracle), the smallest estimated one (gaussian), the heads with the smallest mean on the other text (static), or any
    (random). All of them decide from the run without edits. Counts, not speed: nothing is skipped here."""
    opened = model if isinstance(model, Opened) else open_model(model)
    texts = [look(opened, ids, question) for ids in passages(opened, 2, length)]
    draw = np.random.default_rng(seed)
    rises: dict[str, dict[float, list[float]]] = {}
    clean, none = [], []
    for text, other in zip(texts, texts[::-1], strict=True):
        clean.append(text.loss(np.ones(text.far.shape, bool)))
        none.append(text.loss(np.zeros(text.far.shape, bool)) - clean[-1])
        orders = {
            "oracle": text.far,
            "gaussian": text.predicted(text.moments),
            "static": other.rank(text.far.shape),
            "random": draw.random(text.far.shape),
        }
        for name, order in orders.items():
            for level in levels:
                rise = text.loss(order > np.quantile(order, level)) - clean[-1]
                rises.setdefault(name, {}).setdefault(level, []).append(rise)
    means = {name: {level: float(np.mean(x)) for level, x in by.items()} for name, by in rises.items()}
    total = {name: float(np.mean(list(by.values()))) for name, by in means.items()}
    holds = total["oracle"] <= total["gaussian"] < min(total["static"], total["random"])
    level = 0.8 if 0.8 in levels else levels[-1]
    at = {name: by[level] for name, by in means.items()}
    return Finding(
        measured={"loss": np.mean(clean), "rise": means, "rise_all_local": np.mean(none), "mean_rise": total},
        expected="Averaged over the shares of local decisions the loss rises least for the oracle, then the estimate.",
        verdict="holds" if holds else "fails",
        reason=(
            f"With {level:.0%} of decisions local the loss {np.mean(clean):.2f} changes by {at['oracle']:+.3f} "
            f"(oracle), {at['gaussian']:+.3f} (estimate), {at['static']:+.3f} (whole heads), {at['random']:+.3f} "
            f"(random), with all local by {np.mean(none):+.3f}; {2 * (question.queries - 1)} tokens."
        ),
        model=opened.name,
        seeds=[seed],
    )


def passages(opened: Opened, count: int, length: int) -> Int[Tensor, "count length"]:
    """The first `count` stretches of the English prose that do not overlap."""
    ids = opened.tokenizer(haystack(), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if len(ids) < count * length:
        raise HeadwiseError(f"length: the text has {len(ids)} tokens, not {count} times {length}.")
    return ids[: count * length].view(count, length)


@dataclass(frozen=True, eq=False)
class Look:
    """What one text showed: the far share of every decision, and what is needed to estimate it."""

    opened: Opened
    ids: Int[Tensor, " token"]
    question: LongContextHeads
    far: Decisions
    values: xr.Dataset
    moments: KeyMoments
    correlation: Float[np.ndarray, "layer head"]

    @property
    def long(self) -> Bool[np.ndarray, "layer head query"]:
        return self.far > 1 - self.question.tau

    def predicted(self, moments: KeyMoments) -> Decisions:
        """The estimated far share, from the moments of this or another text."""
        near = self.values["lse"] + np.log((1 - self.values["propagate"].isel(column=0)).clip(min=TINY))
        count = len(self.question.spans(len(self.ids))[0])
        return plain(share(moments.log_mass(self.values["input_q"], count), near))

    def estimate(self, moments: KeyMoments) -> Bool[np.ndarray, "layer head query"]:
        return self.predicted(moments) > 1 - self.question.tau

    def rank(self, shape: tuple[int, ...]) -> Decisions:
        """For every head the share of heads with a smaller mean far share, the same for all queries."""
        mean = self.far.mean(-1)
        order = mean.ravel().argsort().argsort().reshape(mean.shape) / mean.size
        return np.broadcast_to(order[..., None], shape)

    @cached_property
    def cache(self) -> Any:
        """What the model keeps of all tokens before the queries."""
        start = self.question.spans(len(self.ids))[1].start
        with torch.no_grad():
            return self.opened.model(input_ids=self.ids[None, :start], use_cache=True).past_key_values

    @torch.no_grad()
    def loss(self, long: Bool[np.ndarray, "layer head query"]) -> float:
        """Mean loss over the last tokens, where every decision that is not long sees the near keys only."""
        far, queries = self.question.spans(len(self.ids))
        segments = Segments.from_spans({"far": (far.start, far.stop)}, len(self.ids), rest="near")
        edits = [
            Reweight(layer=layer, groups=("near", "far"), rule=partial(localise, torch.tensor(long[layer])))
            for layer in range(len(long))
        ]
        tail, cache = self.ids[None, queries.start :], copy.deepcopy(self.cache)
        # Only the dense path gives a rule all queries at once; the others walk over blocks of them.
        with force_path("dense"), attend(self.opened, edits=edits, segments=segments):
            logits = self.opened.model(input_ids=tail, past_key_values=cache, use_cache=True).logits
        return F.cross_entropy(logits[0, :-1].float(), tail[0, 1:]).item()


def localise(long: Bool[Tensor, "head query"], masses: Float[Tensor, "batch head query 2"]) -> Tensor:
    """Weights of the near and the far keys: (1, 1) for a long decision, (1 / near mass, 0) for a local one."""
    long = long.to(masses.device)
    near = torch.where(long, 1.0, 1 / masses[..., 0].clamp(min=TINY))
    return torch.stack([near, long.expand_as(near).to(near)], -1)


@torch.no_grad()
def look(opened: Opened, ids: Int[Tensor, " token"], question: LongContextHeads) -> Look:
    """One forward pass with the question's readings."""
    ids = ids.to(opened.device)
    prompt = Prompt({"input_ids": ids[None]})
    with attend(opened, readings=question.readings_at(opened, prompt)) as run:
        opened.model(**prompt.inputs, **quiet(opened.model))
    values = run.tree["text"].to_dataset().sel(query=list(question.spans(len(ids))[1]))
    found = question.reduce(values, prompt)["correlation"].transpose("layer", "head").values
    return Look(
        opened, ids, question, plain(values["propagate"].isel(column=0)), values, KeyMoments.read(values), found
    )


def plain(x: xr.DataArray) -> Decisions:
    return x.isel(sample=0).transpose("layer", "head", "query").values.astype(float)
