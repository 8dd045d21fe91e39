"""A small model around a mechanism, trained on a task of the swap bench: what studies of single mechanisms share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from headwise.study.bench_tasks import BenchTask, LanguageModel
from headwise.study.hosts import Make, matched
from headwise.study.train import Recipe, build, train


def host(
    make: Make, task: BenchTask, seed: int = 0, dim: int = 64, layers: int = 2, parameters: int | None = None
) -> nn.Module:
    """Untrained. With `parameters` the feed-forward part is as wide as gives it that many, else 4 times the model's."""

    def sized(hidden: int) -> nn.Module:
        return task.host(make, dim, layers, hidden)

    return build(lambda: sized(4 * dim) if parameters is None else matched(sized, parameters, 4 * dim), seed)


def fitted(model: nn.Module, task: BenchTask, seed: int, steps: int, lr: float = 3e-3) -> nn.Module:
    """Trained in place and given back: AdamW, a tenth of the steps to warm up, then down to 0 along a half cosine."""
    train(model, task.draw, Recipe(steps, lr, warmup=steps // 10, decay="cosine", seed=seed))
    return model


def pair_bits(task: LanguageModel) -> float:
    """Bits per held-out character of a table of character pairs (counts plus one): as far as a model gets that mixes no
    tokens. Where attention is not below it, it has not been used, and nothing can be said of what replaces it."""
    counts = torch.ones(task.vocabulary, task.vocabulary)
    ones = torch.ones(len(task.training) - 1)
    counts.index_put_((task.training[:-1], task.training[1:]), ones, accumulate=True)
    table = (counts / counts.sum(1, keepdim=True)).log2()
    return -table[task.kept[:-1], task.kept[1:]].double().mean().item()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def by_seed(measure: Callable[[int], dict[str, float]], seeds: tuple[int, ...]) -> dict[str, list[float]]:
    """What a measurement gives, by name, a number a seed."""
    rows = [measure(seed) for seed in seeds]
    return {name: [row[name] for row in rows] for name in rows[0]}
