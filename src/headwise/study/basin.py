"""Is attention over a list of documents a basin, and does the answer come easier from the slots that get more of it?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int

from headwise.attention import attend
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.basin import AttentionBasin, basin_layer, edge_ratio
from headwise.study.finding import Finding
from headwise.study.registry import study

PAPER = Paper("Attention Basin: Why Contextual Position Matters in Large Language Models", "2508.05128")
ASKED = AttentionBasin(slots=8, shuffles=96)
DRAWS = 1000


@study(
    "basin_profile",
    paper=PAPER,
    room="scan",
    claim="In shallow layers the first and the last of several documents get more attention than those in between.",
)
def basin_profile(model: Any = "zoo:llm", question: AttentionBasin = ASKED, seed: int = 0) -> Finding:
    """The layer is the shallowest with a basin in the first third of the layers on half of the prompts; its edge ratio
    is measured on the other half, with an interval over prompts. Beside it stand the same documents run together
    without borders, and the slots of every prompt shuffled. Where no shallow layer has a basin, the one with the
    largest edge ratio is reported."""
    opened = model if isinstance(model, Opened) else open_model(model)
    seen = measure(opened, question)
    half = len(seen.mass) // 2
    layers = seen.mass.shape[1]
    shallow = profile(seen.mass[:half, : -(-layers // 3)])
    layer = basin_layer(shallow)
    has = layer is not None
    if layer is None:
        layer = int(edge_ratio(shallow).argmax("layer"))
    held_out = seen.mass[half:, layer]
    low, high = interval(held_out, seed)
    together = measure(opened, replace(question, separated=False, shuffles=len(held_out))).mass[:, layer]
    rng = np.random.default_rng(seed)
    found = ratio(held_out)
    return Finding(
        measured={
            "layer": layer,
            "edge_ratio": found,
            "interval": [low, high],
            "profile": held_out.mean(0),
            "edge_ratio_without_borders": ratio(together),
            "interval_without_borders": interval(together, seed),
            "edge_ratio_slots_shuffled": ratio(rng.permuted(held_out, axis=1)),
            "edge_ratio_of_layers": edge_ratio(profile(seen.mass[half:])).values,
            "layers_with_a_basin": basins(profile(seen.mass[half:])),
        },
        expected="A shallow layer with a basin, whose edge ratio on other prompts is above 1.3 with 95% certainty.",
        verdict="holds" if has and low > 1.3 else "fails",
        reason=(
            f"{'' if has else 'No layer of the first third has a basin; '}layer {layer} has an edge ratio of "
            f"{found:.2f} ({low:.2f} to {high:.2f}) over {question.slots} documents of equal form, "
            f"{ratio(together):.2f} without borders between them."
        ),
        model=opened.name,
        seeds=[seed],
    )


@study(
    "basin_answer",
    paper=PAPER,
    room="scan",
    claim="A fact is easier to answer from a slot that gets more attention.",
)
def basin_answer(model: Any = "zoo:llm", question: AttentionBasin = ASKED, seed: int = 0) -> Finding:
    """Log-probability of the right answer by the slot its fact stands in, correlated over slots with the attention
    profile of the layer chosen as in `basin_profile`, here on all prompts; 95% interval over prompts, drawn slot by
    slot. Beside it: the correlation with the mean profile of all layers."""
    opened = model if isinstance(model, Opened) else open_model(model)
    seen = measure(opened, question)
    shallow = profile(seen.mass[:, : -(-seen.mass.shape[1] // 3)])
    layer = basin_layer(shallow)
    if layer is None:
        layer = int(edge_ratio(shallow).argmax("layer"))
    slots = range(question.count)
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(seen.gold == slot) for slot in slots]

    def correlation(mass: Float[np.ndarray, "prompt slot"], rows: list[np.ndarray]) -> float:
        answers = [seen.answer[row].mean() for row in rows]
        return float(np.corrcoef(mass[np.concatenate(rows)].mean(0), answers)[0, 1])

    drawn = [[rng.choice(group, len(group)) for group in groups] for _ in range(DRAWS)]
    found = correlation(seen.mass[:, layer], groups)
    low, high = np.quantile([correlation(seen.mass[:, layer], rows) for rows in drawn], [0.025, 0.975])
    answers = [float(seen.answer[group].mean()) for group in groups]
    return Finding(
        measured={
            "layer": layer,
            "correlation": found,
            "interval": [low, high],
            "correlation_all_layers": correlation(seen.mass.mean(1), groups),
            "log_probability": answers,
            "profile": seen.mass[:, layer].mean(0),
            "prompts": len(seen.mass),
        },
        expected="A positive correlation over slots, with 95% certainty.",
        verdict="holds" if low > 0 else "fails",
        reason=(
            f"Over {question.count} slots the correlation of attention (layer {layer}) and log-probability of the "
            f"answer is {found:.2f} ({low:.2f} to {high:.2f}); the log-probability lies between {min(answers):.2f} and "
            f"{max(answers):.2f}."
        ),
        model=opened.name,
        seeds=[seed],
    )


@dataclass(frozen=True, eq=False)
class Seen:
    """Of every prompt: attention of the request to each slot (mean over heads), the slot asked for, and the
    log-probability of the answer's last word."""

    mass: Float[np.ndarray, "prompt layer slot"]
    gold: Int[np.ndarray, " prompt"]
    answer: Float[np.ndarray, " prompt"]


def measure(opened: Opened, question: AttentionBasin) -> Seen:
    """One forward pass a prompt, with the answer behind it; studies run one after the other share it."""
    key = (opened.fingerprint, question)
    if key not in _SEEN:
        rows = [
            one(opened, question, seed) for seed in range(question.first_seed, question.first_seed + question.shuffles)
        ]
        _SEEN[key] = Seen(*(np.array(column) for column in zip(*rows, strict=True)))
    return _SEEN[key]


_SEEN: dict[tuple[str, AttentionBasin], Seen] = {}


@torch.no_grad()
def one(opened: Opened, question: AttentionBasin, seed: int) -> tuple[np.ndarray, int, float]:
    shelf = question.shelf(seed)
    assert shelf.gold is not None  # the studies ask for the built-in facts
    before, word = shelf.answer.rsplit(" ", 1)
    start = question.prompt(opened, shelf, before).length
    prompt = question.prompt(opened, shelf, f"{before} {word}")
    readings = question.readings_at(opened, prompt)
    with attend(opened, readings=readings, segments=prompt.segments) as run:
        logits = opened.model(**prompt.inputs, use_cache=False).logits[0]
    slots = question.reduce(run.tree["text"].to_dataset(), prompt)["layers"].transpose("layer", "slot")
    ids = prompt.inputs["input_ids"][0]
    chances = logits[start - 1 : -1].float().log_softmax(-1).gather(1, ids[start:, None])
    return slots.values, shelf.gold, chances.sum().item()


def profile(mass: Float[np.ndarray, "prompt layer slot"]) -> xr.DataArray:
    mean = mass.mean(0)
    return xr.DataArray(mean, {"layer": range(len(mean))}, ("layer", "slot"))


def ratio(mass: Float[np.ndarray, "prompt slot"]) -> float:
    return edge_ratio(xr.DataArray(mass.mean(0), dims="slot")).item()


def basins(layers: xr.DataArray) -> list[int]:
    """All layers that have a basin."""
    return [int(n) for n in layers["layer"].values if basin_layer(layers.sel(layer=[n])) is not None]


def interval(mass: Float[np.ndarray, "prompt slot"], seed: int) -> tuple[float, float]:
    """95% interval of the edge ratio, over prompts drawn with replacement."""
    chosen = np.random.default_rng(seed).integers(len(mass), size=(DRAWS, len(mass)))
    found = edge_ratio(xr.DataArray(mass[chosen].mean(1), dims=("draw", "slot")))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
