"""Can a network over query and key score what no product of them can, and does that help a language model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise import swap
from headwise.attention.call import AttentionCall
from headwise.study.bench_tasks import TASKS, quality
from headwise.study.finding import Finding
from headwise.study.hosts import HostOutput, matched
from headwise.study.registry import study
from headwise.study.swap_train import by_seed, count, fitted, host
from headwise.study.train import Draw, Recipe, build, train

PAPER = swap.NeuralAttention.paper
DIM = 32


@study(
    "neural_attention_pairs",
    paper=PAPER,
    room="swap",
    claim="One head of neural attention learns a rule of pairs that is no product of them; a dot product does not.",
)
def neural_attention_pairs(seeds: Sequence[int] = (0, 1, 2), steps: int = 1000, length: int = 8) -> Finding:
    """Every token holds two numbers a and b and a bit; asked of each is the bit of the one token whose b is near its a.
    A single head, nothing but linear maps before it and a small network behind it: the score that is wanted peaks at
    a = b, a dot product of linear maps of a and b is monotone in b. Dot products 32 and 2 wide, and the additive score
    of earlier translation models as a third; all with as many parameters as neural attention, through the network
    behind."""
    draw = near_pairs(length)
    layers = {
        "neural": lambda: swap.NeuralAttention(DIM, 1, proj_dim=8),
        "dot product": lambda: swap.Attention(DIM, 1),
        "dot product, 2 wide": lambda: swap.Attention(DIM, 1, head_dim=2, value_dim=DIM),
        "additive": lambda: swap.Attention(DIM, 1, score=swap.Additive(DIM, 8)),
    }
    full = count(OneHead(layers["neural"](), 2 * DIM))
    dead: list[float] = []

    def measure(seed: int) -> dict[str, float]:
        found = {}
        for name, layer in layers.items():
            model = build(lambda layer=layer: matched(lambda hidden: OneHead(layer(), hidden), full, 2 * DIM), seed)  # type: ignore[misc]
            train(model, draw, Recipe(steps, 3e-3, warmup=steps // 10, decay="cosine", seed=seed))
            found[name] = right(model, draw)
            if name == "neural":
                dead.append(dead_pairs(model, draw))
        return found

    accuracy = by_seed(measure, tuple(seeds))
    mean = {name: float(np.mean(values)) for name, values in accuracy.items()}
    others = [accuracy["dot product"], accuracy["dot product, 2 wide"]]
    holds = min(accuracy["neural"]) > 0.95 and max(max(values) for values in others) < 0.8
    return Finding(
        measured={"accuracy": accuracy, "mean": mean, "parameters": full, "chance": 0.5, "dead_pairs": dead},
        expected="On every seed neural attention is right in more than 95%, both dot products in less than 80%.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Right with neural attention in {mean['neural']:.1%} (worst seed {min(accuracy['neural']):.1%}), with dot "
            f"products in {mean['dot product']:.1%} and {mean['dot product, 2 wide']:.1%}, with the additive score in "
            f"{mean['additive']:.1%}."
        ),
        model=f"one head of width {DIM}, trained for {steps} steps",
        seeds=list(seeds),
    )


@study(
    "neural_attention_language",
    paper=PAPER,
    room="swap",
    claim="Neural attention in the first layer of a decoder lowers its perplexity by 5% or more.",
)
def neural_attention_language(
    seeds: Sequence[int] = (0, 1, 2), steps: int = 400, dim: int = 64, layers: int = 2
) -> Finding:
    """Characters of Python's help texts in windows of 64, bits per character on the held-out tenth. Neural attention
    with the paper's sizes (2 numbers a query and key) in the first layer alone, and as a control in all layers;
    parameters are equal through the feed-forward part. The paper's models are far larger and trained on words for 2
    million steps."""
    task = TASKS["lm"]()
    kinds: dict[str, int] = {"standard": 0, "first layer": 1, "all layers": layers}

    def make(first: int) -> Any:
        return lambda layer: (swap.NeuralAttention if layer < first else swap.Attention)(dim, 4, causal=True)

    full = count(host(make(1), task, 0, dim, layers))

    def measure(seed: int) -> dict[str, float]:
        models = {name: host(make(first), task, seed, dim, layers, full) for name, first in kinds.items()}
        return {name: quality(fitted(model, task, seed, steps), task) for name, model in models.items()}

    bits = by_seed(measure, tuple(seeds))
    change = [2 ** (one - other) - 1 for one, other in zip(bits["first layer"], bits["standard"], strict=True)]
    mean = {name: float(np.mean(values)) for name, values in bits.items()}
    return Finding(
        measured={"bits_per_character": bits, "mean": mean, "perplexity_change": change, "parameters": full},
        expected="The perplexity is at least 5% lower on average, and lower on every seed.",
        verdict="holds" if np.mean(change) <= -0.05 and max(change) < 0 else "fails",
        reason=(
            f"Perplexity changes by {np.mean(change):+.1%} with neural attention in the first layer (seeds "
            f"{', '.join(f'{c:+.1%}' for c in change)}): {mean['standard']:.3f} bits per character without, "
            f"{mean['first layer']:.3f} with it, {mean['all layers']:.3f} with it in all layers."
        ),
        model=f"decoders of {layers} layers, trained for {steps} steps",
        seeds=list(seeds),
    )


class OneHead(nn.Module):
    """A linear map, one attention layer, a network behind it that gives two logits a token."""

    def __init__(self, attention: nn.Module, hidden: int):
        super().__init__()
        self.embed, self.attention = nn.Linear(3, DIM), attention
        self.read = nn.Sequential(nn.Linear(DIM, hidden), nn.GELU(), nn.Linear(hidden, 2))

    def forward(
        self, x: Float[Tensor, "batch token 3"], labels: Int[Tensor, "batch token"] | None = None
    ) -> HostOutput:
        logits = self.read(self.attention(self.embed(x)))
        if labels is None:
            return HostOutput(logits)
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return HostOutput(logits, nll, nll)


def near_pairs(length: int, rows: int = 64) -> Draw:
    """Tokens (a, b, 1 or -1). The b are spread over [-1, 1], at least 0.6 steps of 2 / length apart; every a is within
    0.2 steps of one b, the label is that token's bit."""
    step = 2 / length

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        order = uniform(rows, length).argsort(1)
        b = (order + 0.5 + 0.4 * (uniform(rows, length) - 0.5)) * step - 1
        named = torch.randint(length, (rows, length), generator=generator)
        a = b.gather(1, named) + 0.4 * (uniform(rows, length) - 0.5) * step
        bit = torch.randint(2, (rows, length), generator=generator)
        return {"x": torch.stack([a, b, 2.0 * bit - 1], -1), "labels": bit.gather(1, named)}

    return draw


@torch.no_grad()
def right(model: nn.Module, draw: Draw, batches: int = 8) -> float:
    """The share of right answers on batches of a seed of their own."""
    generator = torch.Generator().manual_seed(10_000)
    shares = []
    for _ in range(batches):
        batch = draw(generator)
        shares.append((model(batch["x"]).logits.argmax(-1) == batch["labels"]).double().mean().item())
    return float(np.mean(shares))


@torch.no_grad()
def dead_pairs(model: nn.Module, draw: Draw) -> float:
    """The share of pairs whose score is constant, as no unit of the last hidden layer is above 0."""
    assert isinstance(model, OneHead)
    assert isinstance(model.attention, swap.NeuralAttention)
    layer, x = model.attention, model.embed(draw(torch.Generator().manual_seed(10_000))["x"])
    q, k, v = layer.project(x, x, layer.places(x, None, None))
    assert isinstance(layer.score, swap.PairMLP)
    return layer.score.dead_share(q, k, AttentionCall(q, k, v, layer.scale))
