"""Does a model that need not spend its attention still make a sink?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from headwise import swap
from headwise.attention import Mass, attend
from headwise.study.finding import Finding
from headwise.study.hosts import Decoder
from headwise.study.registry import study
from headwise.study.sink_language import SinkLanguage
from headwise.study.train import Recipe, build, loss_of, train

DIM, HEADS = 64, 4


def layers() -> dict[str, Callable[[int], nn.Module]]:
    same: dict[str, Any] = {"causal": True, "position": swap.Rope()}
    return {
        "softmax": lambda _: swap.Attention(DIM, HEADS, **same),
        "key bias": lambda _: swap.BiasedAttention(DIM, HEADS, **same),
        "sigmoid, normalised": lambda _: swap.ScoreActivation(DIM, HEADS, function="sigmoid", normalise=True, **same),
        "sigmoid": lambda _: swap.ScoreActivation(DIM, HEADS, function="sigmoid", **same),
    }


@study(
    "sink_swaps",
    paper=swap.BiasedAttention.paper,
    room="swap",
    claim="A learned key bias, or sigmoid attention without a normaliser, removes the first token's sink in training.",
)
def sink_swaps(seeds: Sequence[int] = (0, 1, 2), steps: int = 400, length: int = 64) -> Finding:
    """One-layer decoders on bigrams with back-copying with a beginning token at position 0 of every window: where this
    project's training makes a sink. On held-out windows: the share of a row's weights (its sum counts as 1) that the
    first token gets, mean over later queries, in the head with the largest; what the slot gets there; the loss."""
    language = SinkLanguage(length=length, rows=16, bos="fixed")
    rows: list[dict[str, Any]] = []
    for name, make in layers().items():
        for seed in seeds:
            model = build(partial(Decoder, make, language.words + 1, DIM, 1), seed)
            train(model, language, Recipe(steps, lr=3e-3, warmup=20, seed=seed))
            rows.append({"kind": name, "seed": seed} | inspect(model, language, 10_000 + seed))
    by_kind = {name: [r for r in rows if r["kind"] == name] for name in layers()}
    first = {name: [r["first"] for r in found] for name, found in by_kind.items()}
    mean = {
        name: {key: float(np.mean([r[key] for r in found])) for key in ("first", "row_sum", "loss")}
        for name, found in by_kind.items()
    }
    there = min(first["softmax"]) >= 0.15
    pairs = [pair for name in ("key bias", "sigmoid") for pair in zip(first[name], first["softmax"], strict=True)]
    gone = all(new <= old / 2 for new, old in pairs)
    shares = ", ".join(f"{name} {mean[name]['first']:.2f} (loss {mean[name]['loss']:.2f})" for name in mean)
    return Finding(
        measured={"runs": rows, "mean": mean},
        expected=(
            "Softmax gives the first token 0.15 or more in some head on every seed; the key bias and sigmoid without a "
            "normaliser at most half of what softmax gives it on the same seed."
        ),
        verdict="untestable" if not there else "holds" if gone else "fails",
        reason=(
            f"Largest share of the first token: {shares}; with the key bias the tokens of a row sum to "
            f"{mean['key bias']['row_sum']:.2f} in that head, the slot has the rest."
        ),
        model="small decoders trained here",
        seeds=list(seeds),
    )


@torch.no_grad()
def inspect(model: nn.Module, language: SinkLanguage, seed: int) -> dict[str, float]:
    """Of the head that gives the first token most: that share, and the sum of its rows. And the loss of the model."""
    held_out = replace(language, rows=64)
    ids = held_out(torch.Generator().manual_seed(seed))["input_ids"]
    everything = f"window:{language.length}"
    with attend(model, [Mass(("first", everything))]) as run:
        model(input_ids=ids)
    mass = run.tree["text"].dataset["mass"].isel(layer=0, query=slice(1, None))
    total = mass.sel(segment=everything)
    share = (mass.sel(segment="first") / total.clip(1e-9)).mean(("sample", "query")).values
    head = int(share.argmax())
    sums = total.mean(("sample", "query")).values
    return {"first": float(share[head]), "row_sum": float(sums[head]), "loss": loss_of(model, held_out, 1, seed)}
