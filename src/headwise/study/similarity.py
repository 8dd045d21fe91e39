"""At which grain do two models, or two layers of one, agree: neuron by neuron, or as spaces?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from headwise import scan
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.similarity import Features, baseline, grid, similarity
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.relations import passages
from headwise.study.retrieval import spearman
from headwise.study.untrained import untrained

PAPER = Paper("Speech Representation Analysis based on Inter- and Intra-Model Similarities", "2406.16099")
GRAINS = ("maxcorr", "linreg", "svcca", "lincka_debiased")


@study(
    "spaces_not_neurons",
    paper=PAPER,
    room="scan",
    claim="Two models agree in the spaces their layers span, much less neuron by neuron.",
)
def spaces_not_neurons(
    model: Any = "zoo:encoder", other: Any = "zoo:llm", words: int = 95, texts: int = 24, seed: int = 0
) -> Finding:
    """A text encoder and a language model on the same words (mean over pieces), as no second speech model is at hand.
    Every layer of the first with its best among six of the second, on average; less what shuffled words give, as a
    share of what is left to 1. The control is the second model untrained."""
    one, two = (m if isinstance(m, Opened) else open_model(m) for m in (model, other))
    inputs = passages(texts, words)
    x, y = (scan.layer_features(m, inputs, "word") for m in (one, two))
    fresh = scan.layer_features(untrained(two, seed), inputs, "word")
    every = max(1, len(y) // 6)
    y, fresh = y[every - 1 :: every], fresh[every - 1 :: every]
    measured: dict[str, Any] = {"words": x.shape[1], "columns": [x.shape[2], y.shape[2]]}
    for method in GRAINS:
        found = grid(x, y, method).max("layer_b").mean().item()
        control = grid(x, fresh, method).max("layer_b").mean().item()
        chance = baseline(x[len(x) // 2], y[len(y) // 2], method, draws=2, seed=seed)
        measured[method] = {
            "value": found,
            "shuffled": chance,
            "untrained": control,
            "above_shuffled": (found - chance) / (1 - chance),
        }
    spaces, neurons = measured["linreg"]["above_shuffled"], measured["maxcorr"]["above_shuffled"]
    cka = measured["lincka_debiased"]
    holds = spaces > neurons and cka["value"] > cka["untrained"]
    return Finding(
        measured=measured,
        expected="linreg is further above shuffled words than maxcorr, and CKA above that of an untrained model.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Above shuffled words by {spaces:.0%} of what is left to 1 for spaces (linreg), by {neurons:.0%} for "
            f"single neurons (maxcorr); CKA {cka['value']:.2f}, with the second model untrained {cka['untrained']:.2f}."
        ),
        model=f"{one.name}, {two.name}",
        seeds=[seed],
    )


@study(
    "rotated_neurons",
    paper=PAPER,
    room="scan",
    claim="A rotation leaves a layer's space as it is and hides its neurons: CKA and regression stay 1, maxcorr falls.",
)
def rotated_neurons(
    model: Any = "zoo:encoder", words: int = 95, texts: int = 40, seeds: Sequence[int] = (0, 1, 2)
) -> Finding:
    """The words of the prose in the middle layer, against the same rotated at random; and white noise of as many
    columns and 4,000 rows. SVCCA standardises the columns first, so that it may change a little."""
    opened = model if isinstance(model, Opened) else open_model(model)
    features = scan.layer_features(opened, passages(texts, words), "word")
    x = features[len(features) // 2]
    methods = ("maxcorr", "linreg", "svcca", "lincka")
    values = {m: np.mean([similarity(x, x @ rotation(x.shape[1], s), m) for s in seeds]) for m in methods}
    white = [similarity(w := noise(4000, x.shape[1], s), w @ rotation(x.shape[1], s), "maxcorr") for s in seeds]
    kept = min(values["linreg"], values["lincka"])
    holds = kept > 0.999 and values["svcca"] > 0.95 and values["maxcorr"] < 0.8
    return Finding(
        measured=values | {"maxcorr_white": np.mean(white), "words": len(x), "columns": x.shape[1]},
        expected="linreg and CKA above 0.999, SVCCA above 0.95, maxcorr below 0.8.",
        verdict="holds" if holds else "fails",
        reason=(
            f"After a rotation CKA is {values['lincka']:.3f}, linreg {values['linreg']:.3f}, SVCCA "
            f"{values['svcca']:.3f}, maxcorr {values['maxcorr']:.2f} ({np.mean(white):.2f} for white noise)."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


@study(
    "layers_drift_apart",
    paper=PAPER,
    room="scan",
    claim="Within a model neighbouring layers are the most alike, and similarity falls with their distance.",
)
def layers_drift_apart(
    speech: Any = "zoo:speech", texts: Sequence[Any] = ("zoo:encoder", "zoo:llm"), seconds: float = 3.0, seed: int = 0
) -> Finding:
    """Linear CKA (unbiased) of all pairs of layers: of a speech encoder on tones, chirps and bursts of noise (frames of
    the padding left out), of text models on prose. Spearman's correlation of similarity and distance, and how many
    layers are most alike a direct neighbour."""
    measured = {}
    asked = [(speech, sounds(seconds, seed)), *((model, passages(12, 60)) for model in texts)]
    for model, inputs in asked:
        opened = model if isinstance(model, Opened) else open_model(model)
        alike = scan.layer_similarity(opened, opened, inputs, "lincka_debiased")
        measured[opened.name] = drift(alike)
    holds = all(m["rank_correlation"] < 0 and m["nearest_is_neighbour"] > 0.5 for m in measured.values())
    return Finding(
        measured=measured,
        expected="A rank correlation below 0, and most layers most alike a direct neighbour, in every model.",
        verdict="holds" if holds else "fails",
        reason="; ".join(
            f"{name}: rank correlation {m['rank_correlation']:.2f}, {m['nearest_is_neighbour']:.0%} of layers most "
            f"alike a neighbour"
            for name, m in measured.items()
        )
        + ".",
        model=", ".join(measured),
        seeds=[seed],
    )


def drift(alike: xr.DataArray) -> dict[str, float]:
    values = alike.values
    layers = np.arange(len(values))
    distance = np.abs(layers[:, None] - layers)
    upper = np.triu_indices(len(values), 1)
    nearest = np.where(distance == 0, -np.inf, values).argmax(1)
    return {
        "rank_correlation": float(spearman(pd.Series(values[upper]), pd.Series(distance[upper]))),
        "nearest_is_neighbour": float((np.abs(nearest - layers) == 1).mean()),
        "neighbours": float(values[distance == 1].mean()),
        "ends": float(values[0, -1]),
    }


def sounds(seconds: float, seed: int, rate: int = 16_000) -> list[Float[np.ndarray, " sample"]]:
    """Tones, chirps and bursts of noise."""
    draw = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    made = []
    for _ in range(3):
        low, high = np.sort(draw.uniform(150, 3000, 2))
        tone = np.sin(2 * np.pi * low * time) + 0.5 * np.sin(2 * np.pi * 2 * low * time)
        chirp = np.sin(2 * np.pi * (low * time + (high - low) / (2 * seconds) * time**2))
        burst = draw.normal(size=len(time)) * (np.sin(2 * np.pi * draw.uniform(1, 4) * time) > 0)
        made += [(0.3 * wave).astype(np.float32) for wave in (tone, chirp, burst)]
    return made


def noise(rows: int, columns: int, seed: int) -> Features:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rotation(size: int, seed: int) -> Float[Tensor, "column column"]:
    return torch.linalg.qr(noise(size, size, 100 + seed))[0]
