"""Does sigmoid attention train as well as softmax, and what does its bias do?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from headwise import swap
from headwise.attention import HeadOutput, attend
from headwise.study.bench_tasks import TASKS, BenchTask, quality
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.swap_train import by_seed, count, fitted, host

DIM, HEADS = 64, 4


@study(
    "sigmoid_attention",
    paper=swap.SigmoidAttention.paper,
    room="swap",
    claim="With b = -ln(length) and QK-norm sigmoid attention trains as well as softmax; b = 0 starts too large.",
)
def sigmoid_attention(seeds: Sequence[int] = (0, 1, 2), steps: int = 200, rows: int = 16) -> Finding:
    """Decoders of 2 layers, width 64 and 4 heads on the characters of Python's help texts, rotary positions beside the
    task's learned ones, all with equally many parameters. Nats per character on held-out text, and the mean norm of the
    heads' outputs in the first layer before training, over that of softmax from the same seed."""
    task = TASKS["lm"]()
    task.rows = rows  # type: ignore[misc]

    def softmax(qk_norm: bool) -> Callable[[int], nn.Module]:
        return lambda _: swap.Attention(DIM, HEADS, causal=True, position=swap.Rope(), qk_norm=qk_norm)

    def sigmoid(b: float, qk_norm: bool) -> Callable[[int], nn.Module]:
        return lambda _: swap.SigmoidAttention(DIM, HEADS, causal=True, b=b, qk_norm=qk_norm)

    small = -math.log(task.length)  # type: ignore[attr-defined]
    kinds = {
        "softmax": softmax(False),
        "softmax, QK-norm": softmax(True),
        "sigmoid, b = 0": sigmoid(0.0, False),
        "sigmoid, b = -ln n": sigmoid(small, False),
        "sigmoid, b = -ln n, QK-norm": sigmoid(small, True),
    }
    full = count(host(kinds["softmax"], task))

    def measure(seed: int) -> dict[str, float]:
        found = {}
        for name, make in kinds.items():
            model = host(make, task, seed, DIM, parameters=full)
            found[f"start, {name}"] = output_norm(model, task)
            found[name] = quality(fitted(model, task, seed, steps), task) * math.log(2)
        return found

    rows_by_seed = by_seed(measure, tuple(seeds))
    loss = {name: float(np.mean(rows_by_seed[name])) for name in kinds}
    start = {
        name: float(np.mean(np.divide(rows_by_seed[f"start, {name}"], rows_by_seed["start, softmax"])))
        for name in kinds
    }
    best = loss["sigmoid, b = -ln n, QK-norm"]
    close, huge = best - loss["softmax"] <= 0.02, start["sigmoid, b = 0"] >= 4
    worse = loss["sigmoid, b = 0"] - best > 0.02
    listed = ", ".join(f"{name} {value:.3f}" for name, value in loss.items())
    return Finding(
        measured={
            "nats": loss,
            "nats_by_seed": {name: rows_by_seed[name] for name in kinds},
            "start_norm_over_softmax": start,
            "parameters": full,
        },
        expected=(
            "On average over seeds b = -ln n with QK-norm is at most 0.02 nats above softmax; with b = 0 the outputs "
            "begin at 4 times those of softmax or more, and the loss ends more than 0.02 nats above."
        ),
        verdict="holds" if close and huge and worse else "fails",
        reason=(
            f"Nats per character after {steps} steps: {listed}; with b = 0 the heads' outputs begin at "
            f"{start['sigmoid, b = 0']:.1f} times the norm of softmax's."
        ),
        model="small decoders trained here",
        seeds=list(seeds),
    )


def output_norm(model: nn.Module, task: BenchTask) -> float:
    """Mean norm of the heads' outputs in the first layer, on one batch that is held out."""
    batch = next(iter(task.held_out()))
    model.eval()
    with torch.no_grad(), attend(model, [HeadOutput(layers=(0,), what="norm")]) as run:
        model(**batch)
    model.train()
    return float(run.tree["text"].dataset["head_output_norm"].mean())
