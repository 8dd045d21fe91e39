"""How much of a head's attention does position alone explain, and which tokens get more or less than that?

Attention as the posterior of an unknown edge: `p(j | i, x) ~ p(j | i) psi(x_i, x_j)`, the prior being what is known of
the source before any token is read. For a trained head the prior is estimated as the mean of its maps over other texts,
place by place. What the text adds is `KL(a_i || prior_i)` nats; a head that knew only that some visible token is the
source would be off by `KL(a_i || uniform) = log(visible) - entropy`.
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
from headwise.attention.readings import Map
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.dependence import InputDependence
from headwise.scan.needs import quiet
from headwise.scan.question import Column, Prompt

PAPER = Paper("Attention: Marginal Probability is All You Need?", "2304.04556")


@dataclass(frozen=True)
class PositionPrior(InputDependence):
    """`position_prior`: the share of attention's knowledge that position explains, `1 - KL(A || prior) / KL(A ||
    uniform)`, both summed over rows; 1 is a fixed map, 0 no better than any visible token, below 0 worse.
    `position_kl`: `KL(A || prior)` in nats, what is left for content. `offset_prior`: the share that a prior of the
    distance i - j alone explains, which knows no first token.

    Reads what `input_dependence` reads. Each text's prior comes from the others (and one uniform map among them, so
    that no place has a prior of 0, which bounds the KL)."""

    paper: ClassVar[Paper] = PAPER

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "position_prior",
                "Explained by position",
                "Share of what attention knows about its source that its mean map over other texts knows too.",
                "share of KL",
                "looks at places, whatever the text",
            ),
            Column("position_kl", "Left for content", "How far a row is from the mean of that row in other texts.",
                   "nats", "looks at content"),
            Column("offset_prior", "Explained by distance", "The same share, knowing distances between tokens only.",
                   "share of KL", "looks at fixed distances"),
        )  # fmt: skip

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        maps = values["map"].transpose("layer", "sample", "head", "query", "key")
        found = [divergences(layer, maps["query"].values) for layer in maps.values.astype(float)]
        place = {"layer": maps["layer"].values, "head": maps["head"].values}
        return xr.Dataset(
            {name: (("layer", "head"), np.stack([one[name] for one in found])) for name in found[0]}, place
        )

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {
            "position_prior": explained(values["place"], values["uniform"]),
            "position_kl": values["place"],
            "offset_prior": explained(values["offset"], values["uniform"]),
        }


def explained(left: xr.DataArray, whole: xr.DataArray) -> xr.DataArray:
    """`1 - left / whole`; a head that is uniform to within float32 is a fixed map."""
    return (1 - left / whole.where(whole > 1e-6)).where(whole.isnull() | (whole > 1e-6), 1.0)


def divergences(maps: Float[np.ndarray, "text head row key"], places: Sequence[int]) -> dict[str, np.ndarray]:
    """KL [head] in nats, the mean over texts and rows, from the priors "place", "offset" and "uniform"."""
    uniform = even(maps)
    priors = {"place": place_prior(maps, uniform), "offset": offset_prior(maps, uniform, places), "uniform": uniform}
    return {name: divergence(maps, prior).mean((0, 2)) for name, prior in priors.items()}


def even(maps: Float[np.ndarray, "text head row key"]) -> Float[np.ndarray, "row key"]:
    """Every key that some text and head sees from that row, all alike."""
    seen = (maps > 0).any((0, 1))
    return seen / seen.sum(-1, keepdims=True)


def place_prior(
    maps: Float[np.ndarray, "text head row key"], uniform: Float[np.ndarray, "row key"]
) -> Float[np.ndarray, "text head row key"]:
    """For each text the mean of the maps of all others and of one that is uniform."""
    return (maps.sum(0) - maps + uniform) / len(maps)


def offset_prior(
    maps: Float[np.ndarray, "text head row key"], uniform: Float[np.ndarray, "row key"], places: Sequence[int]
) -> Float[np.ndarray, "text head row key"]:
    """The same, from the mean weight at each distance, brought to sum 1 over the keys a row sees."""
    lag = np.asarray(places)[:, None] - np.arange(maps.shape[-1])
    lag = (lag - lag.min()).ravel()
    total = np.apply_along_axis(lambda x: np.bincount(lag, x), -1, maps.reshape(*maps.shape[:2], -1))
    count = np.bincount(lag, (uniform > 0).ravel())
    curve = (total.sum(0) - total) / np.maximum(count, 1)
    prior = curve[..., lag].reshape(maps.shape) * (uniform > 0)
    known = prior.sum(-1, keepdims=True)
    prior = np.where(known > 0, prior / np.where(known > 0, known, 1), uniform)
    return ((len(maps) - 1) * prior + uniform) / len(maps)


def divergence(
    maps: Float[np.ndarray, "*place key"], prior: Float[np.ndarray, "*place key"]
) -> Float[np.ndarray, "*place"]:
    """`sum_j a_j log(a_j / prior_j)` in nats."""
    there = maps > 0
    ratio = np.where(there, maps, 1) / np.where(there, prior, 1)
    return (maps * np.log(ratio)).sum(-1)


def edge_posterior(
    opened: Opened, layer: int, head: int, ids: Int[Tensor, "text token"] | None = None, stream: str = "text"
) -> xr.Dataset:
    """One head's maps with the prior divided out: `posterior` a_ij, `prior` [text, query, key], and `log_ratio`, `ln
    a_ij - ln prior_ij`: what the tokens themselves say for (above 0) or against an edge, up to a constant of each row;
    nan where the query does not see the key.

    `ids` are texts of one length without padding, each the others' prior; None takes the windows of `PositionPrior`."""
    if ids is None:
        lacking = PositionPrior().lacks(opened)
        if lacking is not None:
            raise HeadwiseError(f"ids: {opened.name} lacks {lacking}, so that it has no texts of its own; give ids.")
        ids = PositionPrior().prompts(opened)[0].inputs["input_ids"]
    if ids.ndim != 2 or len(ids) < 2:
        raise HeadwiseError(f"ids: wanted two or more texts as [text, token]; got shape {tuple(ids.shape)}.")
    reading = Map(layers=layer, heads=head, stream=stream)
    with attend(opened, readings=[reading]) as run, torch.no_grad():
        opened.model(input_ids=ids.to(opened.device), **quiet(opened.model))
    found = run.tree[stream]["map"].sel(layer=layer, head=head, drop=True).transpose("sample", "query", "key")
    maps = found.values.astype(float)[:, None]
    prior = place_prior(maps, even(maps))
    with np.errstate(divide="ignore", invalid="ignore"):  # a weight below float32 has no logarithm, -inf
        ratio = np.where(prior > 0, np.log(maps) - np.log(prior), np.nan)
    data = {"posterior": maps, "prior": prior, "log_ratio": ratio}
    dims = ("text", "query", "key")
    return xr.Dataset({name: (dims, x[:, 0]) for name, x in data.items()})
