"""Does a layer whose queries, keys and values modulate each other learn faster, and does its cost grow linearly?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from headwise import swap
from headwise.study.bench_tasks import Images, quality
from headwise.study.finding import Finding
from headwise.study.hosts import Block, HostOutput
from headwise.study.registry import study
from headwise.study.swap_slim import counted_flops
from headwise.study.swap_train import count
from headwise.study.train import Recipe, build, train

PAPER = swap.TriadicAttention.paper
DIM = 64
RULES: dict[str, dict] = {
    "triadic": {"rule_v": "latent_awake"},
    "triadic, isolation": {"rule_qk": "isolation", "rule_v": "isolation"},
    "triadic, AD": {"rule_qk": "ad", "rule_v": "ad"},
    "triadic, AD + awake": {"rule_qk": "ad_awake", "rule_v": "ad_awake"},
}


class Classed(nn.Module):
    """A vision transformer of one layer that reads its class token, which stands first."""

    def __init__(self, mechanism: nn.Module, width: int, tokens: int, classes: int):
        super().__init__()
        self.embed, self.latent = nn.Linear(width, DIM), swap.LatentTokens(1, DIM)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, DIM))
        self.block, self.norm, self.head = Block(mechanism, DIM, 2 * DIM), nn.RMSNorm(DIM), nn.Linear(DIM, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> HostOutput:
        logits = self.head(self.norm(self.block(self.latent(self.embed(x) + self.place))[:, 0]))
        if labels is None:
            return HostOutput(logits)
        nll = nn.functional.cross_entropy(logits, labels)
        return HostOutput(logits, nll, nll)


class Pixels(Images):
    """The same digits, pixel by pixel: 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.training, self.kept = ((one_by_one(x), y) for x, y in (self.training, self.kept))


def one_by_one(patches: Tensor) -> Tensor:
    """16 patches of 2 x 2 -> 64 pixels, row by row."""
    return patches.view(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 64, 1)


@study(
    "triadic_learning",
    paper=PAPER,
    room="swap",
    claim="One triadic layer reaches the accuracy of one attention layer in a tenth of the steps.",
)
def triadic_learning(
    seeds: Sequence[int] = (0, 1, 2), steps: int = 400, marks: Sequence[int] = (10, 20, 40, 80, 150, 250, 400)
) -> Finding:
    """Digits of 8 x 8 pixels as 64 tokens and a class token, one layer of width 64 with one head, 12 values kept;
    accuracy on images held out along the training, at a constant rate of 2e-3. Beside the authors' vision layer the
    rules of modulation one by one ("isolation" is none), and attention with an equally wide feed-forward part. The
    paper speaks of orders of magnitude."""
    task = Pixels()
    makes = {"attention": partial(swap.Attention, DIM, 1)} | {
        name: partial(swap.TriadicAttention, DIM, **own) for name, own in RULES.items()
    }
    marks = [mark for mark in marks if mark <= steps]
    curves: dict[str, list[list[float]]] = {name: [] for name in makes}
    sizes = {}
    for seed in seeds:
        for name, make in makes.items():
            model = build(lambda make=make: Classed(make(), 1, 64, 10), seed)  # type: ignore[misc]
            sizes[name] = count(model)
            trained = train(model, task.draw, Recipe(steps, 2e-3, warmup=10, seed=seed), keep=marks)
            curves[name].append([quality(at, task) for _, at in trained.each()])
    mean = {name: np.mean(rows, 0) for name, rows in curves.items()}
    early = [i for i, mark in enumerate(marks) if mark <= steps / 10]
    fast = [
        max(fast[i] for i in early) >= plain[-1]
        for fast, plain in zip(curves["triadic"], curves["attention"], strict=True)
    ]
    return Finding(
        measured={"steps": marks, "accuracy": curves, "mean": mean, "parameters": sizes, "chance": 0.1},
        expected=(
            f"On every seed the triadic layer is, by step {marks[early[-1]]}, as accurate as attention after {steps}."
        ),
        verdict="holds" if all(fast) else "fails",
        reason=(
            f"Accuracy after {marks[early[-1]]} and {steps} steps, means over seeds: "
            + "; ".join(f"{name} {row[early[-1]]:.0%} and {row[-1]:.0%}" for name, row in mean.items())
            + "."
        ),
        model=f"one layer of width {DIM} on digits, trained here",
        seeds=list(seeds),
    )


@study(
    "triadic_cost",
    paper=PAPER,
    room="swap",
    claim="The operations of triadic modulation grow linearly with the number of tokens.",
)
def triadic_cost(tokens: Sequence[int] = (64, 256, 1024, 4096)) -> Finding:
    """Matrix products of one forward as PyTorch counts them, without the projections, for a layer of width 64 with one
    head; attention beside it. Slopes of log operations against log tokens. Products element by element, which are
    linear by their form, and the search of the largest values are not counted by PyTorch."""
    layers = {"attention": swap.Attention(DIM, 1), "triadic": swap.TriadicAttention(DIM)}
    found: dict[str, list[int]] = {name: [] for name in layers}
    whole: dict[str, list[int]] = {name: [] for name in layers}
    for n in tokens:
        x = torch.randn(1, n, DIM, generator=torch.Generator().manual_seed(0))
        for name, layer in layers.items():
            matrices = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
            whole[name].append(counted_flops(layer, x))
            found[name].append(whole[name][-1] - 2 * n * matrices)
    slopes = {
        name: float(np.polyfit(np.log(tokens), np.log(np.maximum(values, 1)), 1)[0]) for name, values in whole.items()
    }
    rows = {name: values[-1] / max(values[0], 1) for name, values in found.items()}
    holds = slopes["triadic"] < 1.05 and slopes["attention"] > 1.3 and rows["triadic"] == 1
    return Finding(
        measured={
            "tokens": list(tokens),
            "flops": whole,
            "flops_beside_projections": found,
            "slopes": slopes,
            "by_formula": {name: [layer.flops(n) for n in tokens] for name, layer in layers.items()},
        },
        expected="The slope of the whole layer is below 1.05, attention's above 1.3; the products of rows don't grow.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Slopes of {slopes['triadic']:.2f} (triadic) and {slopes['attention']:.2f} (attention) from {tokens[0]} "
            f"to {tokens[-1]} tokens; beside the projections operations grow {rows['triadic']:.0f} and "
            f"{rows['attention']:.0f} times."
        ),
        model=f"single layers of width {DIM}",
    )
