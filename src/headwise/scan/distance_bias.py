"""What does a model's positional encoding prefer before any content: near keys or far ones?

Measured: for a query i the score of a key at a near distance minus that of a key at a far one, both drawn at random.
The mean over many pairs is the head's distance bias.

Predicted for rotary embeddings, from no distance at all: with the pairs of channels (a, b) of queries and keys before
rotation, `mu_d = E[a_q a_k + b_q b_k]`, `nu_d = E[a_q b_k - b_q a_k]` over random pairs of tokens (the products of
their means), the expected score at distance L is `c sum_d (mu_d cos L w_d + nu_d sin L w_d)`, c the scale of the scores
and w_d the frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention import attend
from headwise.attention.readings import Inputs, Reading, Scores
from headwise.attention.rope import Rotary, find_rotary, turn
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan import key_moments
from headwise.scan.needs import quiet
from headwise.scan.question import Column, Prompt, Question

PAPER = Paper("Positional Encoding via Token-Aware Phase Attention", "2509.12635")


@dataclass(frozen=True)
class DistanceBias(Question):
    """`distance_bias`: mean of near minus far score. `distance_bias_spread`: its standard deviation over pairs.

    `near` and `far` are ranges of distances in tokens, the end not included; far = None takes 100 distances from half
    the text on. Both keys of a pair have the same query (what all scores of a query share does not count), and the
    first token, a sink in many heads, is never one of them. Distances look back; the standard error is over queries.

    Profiles over distances (lag = 1, 2, 4, ... tokens): `distance_bias_curve` [layer, head, lag], the mean score, and
    `distance_bias_predicted`, the curve predicted from mu and nu where the model has rotary embeddings."""

    near: tuple[int, int] = (0, 101)
    far: tuple[int, int] | None = None
    queries: int = 128
    pairs: int = 1024
    first_seed: int = 0
    paper: ClassVar[Paper] = PAPER
    drives: ClassVar[bool] = True
    # It needs the model's own rotation to turn queries and keys back, so that it runs the model itself.

    def __post_init__(self) -> None:
        for name, span in (("near", self.near), ("far", self.far)):
            if span is not None and not 0 <= span[0] < span[1]:
                raise HeadwiseError(f"DistanceBias({name}=...) must be (from, to) with 0 <= from < to; got {span!r}.")
        if not 2 <= self.queries <= self.pairs:
            raise HeadwiseError(
                f"DistanceBias(queries=...) must be at least 2, pairs at least as many; got {self.queries!r} and "
                f"{self.pairs!r}."
            )

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                self.name,
                "Distance bias",
                "Mean score of a near key minus that of a far one, whatever they say.",
                "score (nats)",
                "prefers near keys",
            ),
            Column(
                f"{self.name}_spread",
                "Spread of near minus far",
                "How much the score of a near key minus that of a far one varies.",
                "score (nats)",
                "content decides more than distance",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        return None if "text" in self.streams(opened) else "a stream of text"

    def streams(self, opened: Opened) -> Sequence[str]:
        return [s for s in ("text",) if any(x.stream == s and x.kind == "self" for x in opened.sites)]

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        plan = draw(self, prompt.length)
        with attend(opened, readings=plan.readings) as run, torch.no_grad():
            opened.model(**prompt.inputs, **quiet(opened.model))
        seen = run.tree["text"].to_dataset()
        scores = seen["pairs"].dropna("query", how="all")
        near, far = scores.isel(target=slice(None, plan.each)), scores.isel(target=slice(plan.each, None))
        gap = (near - far.assign_coords(near.coords)).astype(float)
        over = ("sample", "query", "target")
        data = {
            "gap": gap.mean(over),
            "gap_count": gap.notnull().sum(("sample", "query")).max("target"),
            "gap_sem": gap.mean("target").std(("sample", "query"), ddof=1) / np.sqrt(gap.sizes["query"]),
            "gap_sq": (gap**2).mean(over),
            "curve": seen["curve"].mean(("sample", "query")).astype(float).dropna("lag", how="all"),
        }
        site = next(s for s in opened.sites if s.stream == "text")
        rotary = find_rotary(opened.model, site.module)
        if rotary is not None:
            data["predicted"] = predicted(seen, rotary, data["curve"]["lag"].values)
        return {"text": xr.Dataset(data).drop_vars("module", errors="ignore")}

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        mean = values["gap"]
        return {
            self.name: mean,
            f"{self.name}_sem": values["gap_sem"],
            f"{self.name}_spread": np.sqrt((values["gap_sq"] - mean**2).clip(min=0)),
        }

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {"curve": f"{self.name}_curve", "predicted": f"{self.name}_predicted"}
        return {new: values[old].transpose("layer", "head", "lag") for old, new in names.items() if old in values}


@dataclass(frozen=True, eq=False)
class Draw:
    readings: list[Reading]
    each: int
    """How many near keys (and as many far ones) a query has."""


def draw(question: DistanceBias, length: int) -> Draw:
    """Which queries and keys are compared in a text of this length."""
    far = question.far or (length // 2, length // 2 + 100)
    most = max(far[1], question.near[1])
    if length - most < question.queries:
        raise HeadwiseError(
            f"texts: DistanceBias wants at least {most + question.queries} tokens for distances up to {most - 1} and "
            f"{question.queries} queries; got {length}."
        )
    generator = torch.Generator().manual_seed(question.first_seed)
    rows = most + torch.randperm(length - most, generator=generator)[: question.queries].sort().values
    each = question.pairs // question.queries
    gaps = [torch.randint(*span, (question.queries, each), generator=generator) for span in (question.near, far)]
    targets = torch.full((length, 2 * each), -1)
    targets[rows] = rows[:, None] - torch.cat(gaps, -1)
    queries = tuple(rows.tolist())
    lags = [2**n for n in range(most.bit_length()) if 2**n < most]
    # `spaced` holds the queries and keys whose means are the content: places all over the text but the first token.
    spaced = tuple(np.linspace(1, length - 1, min(256, length - 1)).astype(int).tolist())
    found: list[Reading] = [
        Scores(targets=targets, queries=queries, stream="text", name="pairs"),
        Scores(lags=lags, queries=queries, stream="text", name="curve"),
        Inputs(("q", "k"), queries=spaced, stream="text"),
        Scores(lags=(0,), queries=spaced, stream="text"),
    ]
    return Draw(found, each)


def predicted(seen: xr.Dataset, rotary: Rotary, lags: Sequence[int]) -> xr.DataArray:
    """The expected score [layer, head, lag] from the mean query and key before rotation."""
    means = []
    for name in ("q", "k"):
        token = "query" if name == "q" else "key"
        x = seen[f"input_{name}"].dropna(token, how="all").transpose("sample", "layer", "head", token, "channel")
        place = torch.tensor(x[token].values, dtype=torch.float64)
        means.append(unturned(torch.tensor(x.values, dtype=torch.float64), place, rotary).mean((0, -2)))
    curve = expected(*means, torch.tensor(lags), rotary)
    scale = key_moments.scale(seen)
    return scale * xr.DataArray(
        curve.numpy(), {"layer": scale["layer"], "head": scale["head"], "lag": list(lags)}, ("layer", "head", "lag")
    )


def unturned(
    x: Float[Tensor, "*batch head token channel"], place: Float[Tensor, " token"], rotary: Rotary
) -> Float[Tensor, "*batch head token channel"]:
    """Queries or keys as they were before their rotation."""
    half = rotary.inv_freq[: x.shape[-1] // 2].to(place)
    return turn(x.flatten(0, -4), -place[:, None] * half, rotary.interleaved).view(x.shape)


def expected(
    q: Float[Tensor, "*batch channel"], k: Float[Tensor, "*batch channel"], lags: Int[Tensor, " lag"], rotary: Rotary
) -> Float[Tensor, "*batch lag"]:
    """`sum_d mu_d cos(L w_d) + nu_d sin(L w_d)` of a mean query and a mean key before rotation; channels that are not
    rotated add their product at every distance."""
    w = rotary.inv_freq[: q.shape[-1] // 2].to(q)
    half = len(w)
    qa, qb, qr = parts(q, half, rotary.interleaved)
    ka, kb, kr = parts(k, half, rotary.interleaved)
    angle = lags.to(q)[:, None] * w
    mu, nu = qa * ka + qb * kb, qa * kb - qb * ka
    return mu @ angle.cos().T + nu @ angle.sin().T + (qr * kr).sum(-1, keepdim=True)


def parts(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The two channels of every rotated pair, and the channels that are not rotated."""
    body, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        return body[..., 0::2], body[..., 1::2], rest
    return body[..., :half], body[..., half:], rest
