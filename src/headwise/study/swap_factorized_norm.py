"""What each half of LayerNorm in front of attention is worth to a narrow language model that trains with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from headwise import scan, swap
from headwise.study.bench_tasks import LanguageModel, quality
from headwise.study.finding import Finding
from headwise.study.hosts import Block, Decoder
from headwise.study.registry import study
from headwise.study.swap_train import by_seed, fitted
from headwise.study.train import build, windows

KINDS = {
    "both": {"project": True, "scale": True},
    "project": {"project": True, "scale": False},
    "scale": {"project": False, "scale": True},
    "neither": {"project": False, "scale": False},
}
DIM, HEADS = 8, 4


@study(
    "factorized_norm_training",
    paper=swap.FactorizedLayerNorm.paper,
    room="swap",
    claim="Without LayerNorm's scaling a narrow language model has keys that no query can choose, and learns less.",
)
def factorized_norm_training(
    seeds: Sequence[int] = (0, 1, 2), steps: int = 250, layers: int = 4, length: int = 256, tokens: int = 256
) -> Finding:
    """Decoders of 4 layers, width 8 and 4 heads, as in the paper, on the characters of Python's help texts (the paper
    trains 50,000 steps on web text with windows of 1,024 tokens). The norm in front of attention, without gain and
    bias, is both halves of LayerNorm, the projection, the scaling, or nothing; all other norms stay. Share of held-out
    tokens, as they enter the attention of each layer, that no query can choose."""
    task = LanguageModel()
    task.length, task.rows = length, 8  # type: ignore[misc]
    rates: dict[str, list[list[float]]] = {name: [] for name in KINDS}

    def measure(seed: int) -> dict[str, float]:
        nats = {}
        for name, halves in KINDS.items():
            model = fitted(build(partial(narrow, task, layers, halves), seed), task, seed, steps)
            nats[name] = quality(model, task) * math.log(2)
            rates[name].append(unselectable_tokens(model, task, tokens))
        return nats

    found = by_seed(measure, tuple(seeds))
    share = {name: float(np.mean(rows)) for name, rows in rates.items()}
    worse = [p - b for p, b in zip(found["project"], found["both"], strict=True)]
    always = all(max(row) == 0 for name in ("both", "scale") for row in rates[name])
    holds = always and all(np.mean(row) >= 0.05 for row in rates["project"]) and min(worse) > 0
    listed = ", ".join(f"{name} {share[name]:.0%} ({np.mean(found[name]):.3f} nats)" for name in KINDS)
    return Finding(
        measured={"nats": found, "unselectable": rates},
        expected=(
            "No unselectable token with the scaling; with the projection alone at least 5% of them on every seed, and "
            "on every seed a higher loss than with both."
        ),
        verdict="holds" if holds else "fails",
        reason=f"Unselectable tokens on average over layers and nats per character after {steps} steps: {listed}.",
        model=f"decoders of width {DIM} and {layers} layers, trained here",
        seeds=list(seeds),
    )


def narrow(task: LanguageModel, layers: int, halves: dict[str, bool]) -> Decoder:
    model = Decoder(
        lambda _: swap.Attention(DIM, HEADS, causal=True), task.vocabulary, DIM, layers, positions=task.length
    )
    for block in model.blocks:
        assert isinstance(block, Block)
        block.norm = swap.FactorizedLayerNorm(DIM, affine=False, eps=1e-6, **halves)  # type: ignore[assignment]
    return model


@torch.no_grad()
def unselectable_tokens(model: nn.Module, task: LanguageModel, tokens: int) -> list[float]:
    """Of every layer, on one held-out window."""
    seen: list[torch.Tensor] = []
    norms = [block.norm for block in model.modules() if isinstance(block, Block)]
    hooks = [norm.register_forward_hook(lambda _m, _a, out: seen.append(out[0])) for norm in norms]
    try:
        model(**windows(task.kept, 1, tokens)(torch.Generator().manual_seed(1)))
    finally:
        for hook in hooks:
            hook.remove()
    return [scan.unselectable(x).double().mean().item() for x in seen]
