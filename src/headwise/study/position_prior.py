"""How much of what trained heads know about their sources do positions alone know?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention import Map, attend
from headwise.models import Opened, open_model
from headwise.scan.needs import quiet
from headwise.scan.position_prior import PAPER, PositionPrior, divergence, even, offset_prior, place_prior
from headwise.study.finding import Finding
from headwise.study.registry import study

ASKED = PositionPrior(sequences=16)
PRIORS = ("place", "shuffled", "distance", "other_head", "place_after_first", "uniform_after_first", "uniform")


@study(
    "position_prior",
    paper=PAPER,
    room="scan",
    claim="Attention is a posterior whose prior is positional: in most trained heads position alone knows most of it.",
)
def position_prior(model: Any = "zoo:llm", question: PositionPrior = ASKED, seed: int = 0) -> Finding:
    """The paper reads positional terms as the prior and states no number; the claim is its reading put to trained
    heads. Each text is measured against the mean map of the other texts. Controls: the prior of the next head of the
    layer, and the head's prior from the other texts with their tokens shuffled, which have positions and no language.
    As the first token, a sink in many heads, is a position too, the measure is repeated on the attention that is left
    when it is taken out."""
    opened = model if isinstance(model, Opened) else open_model(model)
    ids = question.prompts(opened)[0].inputs["input_ids"]
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.stack([row[torch.randperm(len(row), generator=draw).to(row.device)] for row in ids])
    rows = np.unique(np.linspace(1, ids.shape[1] - 1, question.rows).astype(int))
    layers = zip(maps_of(opened, ids, rows), maps_of(opened, mixed, rows), strict=True)
    kl = [left(text, shuffled, rows) for text, shuffled in layers]
    total = {name: np.concatenate([one[name] for one in kl]) for name in PRIORS}
    share = {name: 1 - total[name] / total["uniform"] for name in ("place", "shuffled", "distance", "other_head")}
    share["place_after_first"] = 1 - total["place_after_first"] / total["uniform_after_first"]
    most = {name: float((x > 0.5).mean()) for name, x in share.items()}
    own = float((share["place"] > share["other_head"]).mean())
    middle = {name: np.median(x) for name, x in share.items()}
    holds = most["place"] > 0.5 and own >= 0.9
    return Finding(
        measured={
            "heads_mostly_explained": most,
            "median_share": middle,
            "quartiles_of_place": np.quantile(share["place"], (0.25, 0.5, 0.75)),
            "own_prior_better_than_other_heads": own,
            "nats_left_for_content": np.median(total["place"]),
            "nats_left_by_uniform": np.median(total["uniform"]),
            "least_explained": least(share["place"], opened, 5),
        },
        expected=(
            "Position explains more than half of KL(attention || uniform) in more than half of the heads, and in 90% a "
            "head's own prior explains more than that of the next head of its layer."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Position explains most in {most['place']:.0%} of heads (median share {middle['place']:.2f}; from "
            f"shuffled texts {middle['shuffled']:.2f}, from another head {middle['other_head']:.2f}, from distance "
            f"alone {middle['distance']:.2f}), a head's own prior more than another's in {own:.0%}; with the first "
            f"token taken out in {most['place_after_first']:.0%} (median {middle['place_after_first']:.2f})."
        ),
        model=opened.name,
        seeds=[seed],
    )


def maps_of(
    opened: Opened, ids: Int[Tensor, "text token"], rows: np.ndarray
) -> list[Float[np.ndarray, "text head row key"]]:
    """Some rows of every head's maps, a layer at a time."""
    with attend(opened, readings=[Map(queries=rows.tolist(), stream="text")]) as run, torch.no_grad():
        opened.model(input_ids=ids, **quiet(opened.model))
    maps = run.tree["text"]["map"].sel(query=rows).transpose("layer", "sample", "head", "query", "key")
    return [layer.astype(float) for layer in maps.values]


def left(
    maps: Float[np.ndarray, "text head row key"], shuffled: Float[np.ndarray, "text head row key"], rows: np.ndarray
) -> dict[str, Float[np.ndarray, " head"]]:
    """KL [head] from each prior, in nats."""
    uniform, place = even(maps), place_prior(maps, even(maps))
    priors = {
        "place": place,
        "shuffled": place_prior(shuffled, uniform),
        "distance": offset_prior(maps, uniform, rows),
        "other_head": np.roll(place, 1, axis=1),
        "uniform": uniform,
    }
    kl = {name: divergence(maps, prior).mean((0, 2)) for name, prior in priors.items()}
    later = maps[..., 1:] / np.maximum(maps[..., 1:].sum(-1, keepdims=True), np.finfo(float).tiny)
    flat = even(later)
    kl["place_after_first"] = divergence(later, place_prior(later, flat)).mean((0, 2))
    kl["uniform_after_first"] = divergence(later, flat).mean((0, 2))
    return kl


def least(share: Float[np.ndarray, " head"], opened: Opened, count: int) -> list[list[float]]:
    """Layer, head and share of the heads that position explains least."""
    places = [(site.layer, head) for site in opened.sites if site.stream == "text" for head in range(site.heads)]
    return [[*places[n], round(float(share[n]), 3)] for n in np.argsort(share)[:count]]
