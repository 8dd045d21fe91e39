"""Do models with token-aware phases stand longer texts than those with rotary positions?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from headwise import swap
from headwise.attention import Scores, attend
from headwise.study.bench_tasks import help_texts
from headwise.study.finding import Finding
from headwise.study.hosts import Decoder, Make
from headwise.study.registry import study
from headwise.study.train import Recipe, build, train, windows

LONGER = (1, 2, 4)
LAGS = 8
"""So many near and far distances are compared."""


@study(
    "position_extrapolation",
    paper=swap.TokenAwarePhaseAttention.paper,
    room="swap",
    claim="On texts 4 times as long as in training a phase that knows tokens loses far less than rotary positions.",
)
def position_extrapolation(
    seeds: Sequence[int] = (0, 1, 2), length: int = 64, steps: int = 300, dim: int = 48, layers: int = 2,
    rates: Sequence[float] = (3e-3, 1e-3),
) -> Finding:  # fmt: skip
    """Decoders on the characters of Python's help texts, equal but for how they know positions: rotary, not at all,
    ALiBi, and a token-aware phase, quadratic or linear. Each takes the learning rate of `rates` with which the first
    seed is best on the ninth tenth of the text, at the trained length; the loss at 1, 2 and 4 times that length is
    taken on the last tenth, of the same characters. Bias: the mean of near minus far scores (lags 1 to 8 against the 8
    longest of training, the same query) over its standard deviation, the median of heads. The paper's models are
    trained on 8,192 tokens."""
    kinds: dict[str, Make] = {
        "rope": lambda _: swap.Attention(dim, 4, causal=True, position=swap.Rope()),
        "none": lambda _: swap.Attention(dim, 4, causal=True),
        "alibi": lambda _: swap.Attention(dim, 4, causal=True, position=swap.Alibi()),
        "tapa": lambda _: swap.TokenAwarePhaseAttention(dim, 4, causal=True),
        "tapa, linear": lambda _: swap.TokenAwarePhaseAttention(dim, 4, causal=True, phase="linear"),
    }
    ids, alphabet = help_texts()
    tenth = len(ids) // 10
    training, checking, kept = ids[: 8 * tenth], ids[8 * tenth : 9 * tenth], ids[9 * tenth :]
    draw = windows(training, 16, length)

    def trained(make: Make, rate: float, seed: int) -> nn.Module:
        model = build(lambda: Decoder(make, len(alphabet), dim, layers), seed)
        return train(model, draw, Recipe(steps, rate, warmup=steps // 10, decay="cosine", seed=seed)).model

    losses: dict[str, list[list[float]]] = {name: [] for name in kinds}
    bias: dict[str, list[float]] = {name: [] for name in kinds}
    chosen = {}
    for name, make in kinds.items():
        tried = {rate: trained(make, rate, seeds[0]) for rate in rates}
        chosen[name] = min(rates, key=lambda rate: loss_at(tried[rate], checking, length))
        for seed in seeds:
            model = tried[chosen[name]] if seed == seeds[0] else trained(make, chosen[name], seed)
            losses[name].append([loss_at(model, kept, times * length) for times in LONGER])
            bias[name].append(distance_bias(model, kept, length))
    rise = {name: [row[-1] - row[0] for row in rows] for name, rows in losses.items()}
    far = {name: float(np.mean(rows, 0)[-1]) for name, rows in losses.items()}
    typical = {name: float(np.mean(values)) for name, values in bias.items()}
    less = all(t <= r / 2 and r > 0.05 for t, r in zip(rise["tapa"], rise["rope"], strict=True))
    holds = less and typical["tapa"] < typical["rope"]
    return Finding(
        measured={
            "loss": losses,
            "lengths": [times * length for times in LONGER],
            "rise": rise,
            "bias": bias,
            "learning_rate": chosen,
            "quadratic_beats_linear": far["tapa"] < far["tapa, linear"],
        },
        expected=(
            "On every seed rotary positions lose more than 0.05 nats from the trained length to 4 times that, a phase "
            "at most half as much; its scores have less bias between near and far keys."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"From {length} to {4 * length} characters the loss changes by {np.mean(rise['rope']):+.3f} nats with "
            f"rotary positions, {np.mean(rise['tapa']):+.3f} with a phase, {np.mean(rise['tapa, linear']):+.3f} with a "
            f"linear one, {np.mean(rise['none']):+.3f} without positions, {np.mean(rise['alibi']):+.3f} with ALiBi, to "
            f"{far['rope']:.2f}, {far['tapa']:.2f}, {far['tapa, linear']:.2f}, {far['none']:.2f} and "
            f"{far['alibi']:.2f}; bias over spread {typical['rope']:.2f} with rotary positions, {typical['tapa']:.2f} "
            f"with a phase."
        ),
        model=f"decoders of {layers} layers, trained for {steps} steps",
        seeds=list(seeds),
    )


@torch.no_grad()
def loss_at(model: nn.Module, ids: Int[Tensor, " token"], length: int, tokens: int = 16_384) -> float:
    """On the first `tokens` of a text, in windows of that length."""
    tokens = min(tokens, len(ids)) // (LONGER[-1] * length) * LONGER[-1] * length
    rows = ids[:tokens].view(-1, length).split(16)
    return float(np.average([model(part, labels=part).nll.item() for part in rows], weights=[len(r) for r in rows]))


@torch.no_grad()
def distance_bias(model: nn.Module, ids: Int[Tensor, " token"], length: int, rows: int = 8) -> float:
    """The median over heads of |mean| / standard deviation of near minus far scores."""
    few = min(LAGS, length // 2)
    lags = [*range(1, few + 1), *range(length - few, length)]
    batch = ids[: rows * 2 * length].view(rows, 2 * length)
    asked = Scores(lags=lags, queries=list(range(length, 2 * length)))
    with attend(model, [asked]) as run:
        model(batch)
    scores = run.tree["text"].dataset["scores"].transpose("layer", "head", "sample", "query", "lag").values
    gap = (scores[..., :few] - scores[..., few:]).reshape(*scores.shape[:2], -1)
    return float(np.median(np.abs(gap.mean(-1)) / gap.std(-1)))
