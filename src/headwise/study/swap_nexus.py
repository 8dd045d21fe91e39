"""Does attention with refined queries and keys do in one layer what plain attention needs two for?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from headwise import swap
from headwise.study.bench_tasks import TASKS, BenchTask, quality
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.swap_train import by_seed, count, fitted, host
from headwise.swap.nexus import Inner

PAPER = swap.NexusAttention.paper
INNER: tuple[Inner, ...] = ("qkv", "self", "full")
Kinds = dict[str, tuple[int, Callable[[int], nn.Module]]]
"""How many layers, and the mechanism of one."""


@study(
    "nexus_two_hops",
    paper=PAPER,
    room="swap",
    claim="One layer and one head of second order recalls what followed a key; plain attention of that size does not.",
)
def nexus_two_hops(seeds: Sequence[int] = (0, 1, 2), steps: int = 800, dim: int = 64) -> Finding:
    """Associative recall: 4 keys with random values, over and over in new orders. It takes two hops: the value that is
    wanted stands behind the key, and its own key must say so. One layer, one head, equal parameters through the
    feed-forward part; the three readings of the inner attention, and as a yardstick two layers of plain attention with
    as many parameters: where not even they learn it, the training was too short to tell. Who only knows which values
    are left in a round is right in 52%."""
    task = TASKS["recall"]()

    def plain(_: int) -> nn.Module:
        return swap.Attention(dim, 1, causal=True)

    kinds: Kinds = {"standard": (1, plain), "two layers": (2, plain)}
    for inner in INNER:
        kinds[inner] = (1, second_order(dim, 1, inner))
    accuracy, sizes = compared(kinds, task, seeds, steps, dim)
    mean = {name: float(np.mean(values)) for name, values in accuracy.items()}
    learned = min(accuracy["two layers"]) >= 0.9
    gains = [one - other for one, other in zip(accuracy["qkv"], accuracy["standard"], strict=True)]
    return Finding(
        measured={"accuracy": accuracy, "mean": mean, "parameters": sizes, "chance": task.chance},
        expected=(
            'On every seed second order (inner="qkv") is right in 20 percent points more than plain attention. '
            "Untestable where it is not, and two plain layers are right in less than 90%."
        ),
        verdict="holds" if min(gains) >= 0.2 else "fails" if learned else "untestable",
        reason=(
            f"Right answers: plain {mean['standard']:.1%}, second order "
            f"{', '.join(f'{mean[inner]:.1%} ({inner})' for inner in INNER)}, two plain layers "
            f"{mean['two layers']:.1%}."
        ),
        model=f"one layer of width {dim} with one head, trained for {steps} steps",
        seeds=list(seeds),
    )


@study(
    "nexus_language",
    paper=PAPER,
    room="swap",
    claim="A decoder of second-order attention has a lower loss than a plain one, at equal parameters and equal cost.",
)
def nexus_language(
    seeds: Sequence[int] = (0, 1, 2), steps: int = 400, dim: int = 64, layers: int = 2, heads: int = 4
) -> Finding:
    """Characters of Python's help texts in windows of 64, bits per character on the held-out tenth. Plain decoders with
    as many parameters: of as many layers, and of one more, which costs no less than second order does at this width and
    length. The paper's models have 70 million parameters and more."""
    task = TASKS["lm"]()

    def plain(_: int) -> nn.Module:
        return swap.Attention(dim, heads, causal=True)

    kinds: Kinds = {
        "standard": (layers, plain),
        "one layer more": (layers + 1, plain),
    }
    for inner in INNER:
        kinds[inner] = (layers, second_order(dim, heads, inner))
    bits, sizes = compared(kinds, task, seeds, steps, dim)
    mean = {name: float(np.mean(values)) for name, values in bits.items()}
    cost = {name: n * make(0).flops(64) for name, (n, make) in kinds.items()}  # type: ignore[operator]
    better = {
        rival: all(one < other for one, other in zip(bits["qkv"], bits[rival], strict=True))
        for rival in ("standard", "one layer more")
    }
    return Finding(
        measured={"bits_per_character": bits, "mean": mean, "parameters": sizes, "attention_flops": cost} | better,
        expected='On every seed second order (inner="qkv") needs fewer bits than both plain decoders.',
        verdict="holds" if all(better.values()) else "fails",
        reason=(
            f"Bits per character: plain {mean['standard']:.3f}, with one layer more {mean['one layer more']:.3f}, "
            f"second order {', '.join(f'{mean[inner]:.3f} ({inner})' for inner in INNER)}. Attention costs "
            f"{cost['qkv'] / cost['standard']:.2f} times the plain one's, with one layer more "
            f"{cost['one layer more'] / cost['standard']:.2f} times."
        ),
        model=f"decoders of {layers} layers, trained for {steps} steps",
        seeds=list(seeds),
    )


def second_order(dim: int, heads: int, inner: Inner) -> Callable[[int], nn.Module]:
    return lambda _: swap.NexusAttention(dim, heads, inner=inner, causal=True)


def compared(
    kinds: dict[str, tuple[int, Callable[[int], nn.Module]]],
    task: BenchTask,
    seeds: Sequence[int],
    steps: int,
    dim: int,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """The quality of every kind, a number a seed, and the parameters."""
    full = count(host(kinds["standard"][1], task, 0, dim, max(layers for layers, _ in kinds.values())))
    sizes = {}

    def measure(seed: int) -> dict[str, float]:
        found = {}
        for name, (layers, make) in kinds.items():
            model = host(make, task, seed, dim, layers, full)
            sizes[name] = count(model)
            found[name] = quality(fitted(model, task, seed, steps), task)
        return found

    return by_seed(measure, tuple(seeds)), sizes
