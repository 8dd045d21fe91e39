"""What in softmax matters: its numerator or its denominator? And how many terms of its series does a model need?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from headwise import swap
from headwise.models import Opened, open_model
from headwise.study.bench_tasks import TASKS, quality
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.sinks import windows
from headwise.study.swap_train import by_seed, count, fitted, host

PAPER = swap.SoftmaxAblation.paper
DIM, HEADS = 64, 4


def layers() -> dict[str, Callable[[int], nn.Module]]:
    same: dict[str, Any] = {"causal": True, "position": swap.Rope()}
    return {
        "softmax": lambda _: swap.Attention(DIM, HEADS, **same),
        "exp, L2": lambda _: swap.SoftmaxAblation(DIM, HEADS, normaliser="l2", **same),
        "exp, count and gate": lambda _: swap.SoftmaxAblation(DIM, HEADS, normaliser="count", out_gate=True, **same),
        "linear, elu": lambda _: swap.KernelAttention(DIM, HEADS, kernel="elu1", normalise=True, **same),
        "linear, relu": lambda _: swap.KernelAttention(DIM, HEADS, kernel="relu", normalise=True, **same),
        "first order, L2": lambda _: swap.SoftmaxAblation(
            DIM, HEADS, numerator="taylor", order=1, normaliser="l2", **same
        ),
    }


@study(
    "softmax_parts",
    paper=PAPER,
    room="swap",
    claim="An L2 norm can replace the denominator without loss; a linear kernel can't replace the exponential.",
)
def softmax_parts(seeds: Sequence[int] = (0, 1, 2), steps: int = 200, rows: int = 16) -> Finding:
    """Decoders of 2 layers, width 64 and 4 heads on the characters of Python's help texts, with equally many
    parameters. Nats per character on held-out text, by numerator and denominator. The last row is the first two terms
    of the series, with the norm that replaces the denominator."""
    task = TASKS["lm"]()
    task.rows = rows  # type: ignore[misc]
    kinds = layers()
    full = count(host(kinds["softmax"], task))

    def measure(seed: int) -> dict[str, float]:
        models = {name: host(make, task, seed, DIM, parameters=full) for name, make in kinds.items()}
        return {name: quality(fitted(m, task, seed, steps), task) * math.log(2) for name, m in models.items()}

    found = by_seed(measure, tuple(seeds))
    loss = {name: float(np.mean(x)) for name, x in found.items()}
    linear = min(loss["linear, elu"], loss["linear, relu"], loss["first order, L2"])
    near = abs(loss["exp, L2"] - loss["softmax"]) <= 0.02
    between = max(loss["softmax"], loss["exp, L2"]) < loss["exp, count and gate"] < linear
    listed = ", ".join(f"{name} {value:.3f}" for name, value in loss.items())
    return Finding(
        measured={"nats": loss, "nats_by_seed": found, "parameters": full},
        expected=(
            "On average over seeds: L2 within 0.02 nats of softmax, then count with a gate, then every linear kernel, "
            "also the one with the L2 norm."
        ),
        verdict="holds" if near and between else "fails",
        reason=f"Nats per character after {steps} steps: {listed}.",
        model="small decoders trained here",
        seeds=list(seeds),
    )


@study(
    "taylor_orders",
    paper=PAPER,
    room="swap",
    claim="Every further order of the series takes attention nearer to softmax; about ten terms are enough.",
)
def taylor_orders(
    model: Any = "zoo:llm",
    orders: Sequence[int] = (2, 4, 8, 16, 32, 64, 128, 256),
    sequences: int = 2,
    length: int = 192,
) -> Finding:
    """A trained model with the exponential of every layer cut to the first terms of its series (even orders, which are
    positive), nothing trained: the loss on English prose, over that with softmax. In float64, on a copy: large scores
    raised to high powers leave the range of float32."""
    opened = model if isinstance(model, Opened) else open_model(model)
    exact = deepcopy(opened.model).double()
    ids = windows(opened, sequences, length).to(opened.device)

    def loss() -> float:
        with torch.no_grad():
            return float(exact(input_ids=ids, labels=ids).loss)

    plain, above = loss(), {}
    for order in orders:
        with swap.convert(exact, "softmax_ablation", numerator="taylor", order=order, normaliser="sum"):
            above[order] = loss() - plain
    enough = next((order for order in orders if above[order] <= 0.05), None)
    falling = all(above[a] > above[b] for a, b in pairwise(orders) if above[a] > 0.01)
    holds = falling and enough is not None and enough <= 16
    listed = ", ".join(f"{order}: {value:+.2f}" for order, value in above.items())
    return Finding(
        measured={"loss": plain, "above_softmax": above, "enough": enough},
        expected=(
            "The loss falls with every doubling of the order until it is within 0.01 nats of softmax, and is within "
            "0.05 nats at order 16 or before."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Softmax {plain:.3f} nats; above it at orders {listed}. "
            + ("No order is within 0.05." if enough is None else f"Order {enough} is within 0.05.")
        ),
        model=opened.name,
    )
