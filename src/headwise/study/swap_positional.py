"""Does a model whose attention can't see its data compute right with numbers larger than those of its training?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from headwise import swap
from headwise.study.finding import Finding
from headwise.study.positional_transformer import TASKS, Mode, PositionalTransformer, spread
from headwise.study.registry import study
from headwise.study.swap_train import count
from headwise.study.train import Draw, Recipe, build, train

TRAINED = 2.0
JUDGED = 6


@study(
    "positional_value_scale",
    paper=swap.PositionalAttention.paper,
    room="swap",
    claim="Trained on small numbers, positional attention computes with larger ones, at a tenth or less of the error.",
)
def positional_value_scale(
    tasks: Sequence[str] = ("sum", "min"), seeds: Sequence[int] = (0, 1, 2), steps: int = 800, rows: int = 128,
    width: int = 32, n: int = 8, samples: int = 30_000, ranges: Sequence[int] = (2, 4, 6, 10, 20),
) -> Finding:  # fmt: skip
    """Prefix sums and minima (or the other tasks of `positional_transformer`) of 8 numbers within [-2, 2], 4 layers;
    mean squared errors within wider ranges, on rows that are not all within the first. Beside the standard transformer
    one with rotary positions. The limit: y_i = v_(p_i), a pointer that each node holds, with one layer. The paper
    trains width 64 for 2,001 passes with batches of 1,000 at a rate of 5e-4, here it is a few passes at 2e-3."""
    modes = get_args(Mode)
    errors: dict[str, dict[str, list[list[float]]]] = {task: {mode: [] for mode in modes} for task in tasks}
    pointers: dict[str, list[float]] = {mode: [] for mode in modes}
    sizes = {}
    for seed in seeds:
        x = spread(samples, n, TRAINED, torch.Generator().manual_seed(seed))
        for mode in modes:
            made = {"n": n, "embed_dim": width, "mlp_hidden": width, "mode": mode}
            for task in tasks:
                model = fit(PositionalTransformer, (1, 1), made, picked(x, TASKS[task](x), rows), steps, seed)
                errors[task][mode].append([error(model, task, n, high) for high in ranges])
                sizes[mode] = count(model)
            draw = pointed(n, rows)
            model = fit(PositionalTransformer, (1 + n, 1), made | {"layers": 1}, draw, steps, seed)
            with torch.no_grad():
                pointers[mode].append(model(**pointed(n, 4096)(torch.Generator().manual_seed(10_000))).loss.item())
    median = {t: {m: np.median(rows, 0).tolist() for m, rows in found.items()} for t, found in errors.items()}
    at = list(ranges).index(JUDGED)
    ratio = {task: median[task]["standard"][at] / median[task]["positional"][at] for task in tasks}
    limit = max(pointers["standard"]) < 0.5 * min(pointers["positional"])
    holds = min(ratio.values()) >= 10 and limit
    return Finding(
        measured={
            "median_error": median,
            "errors": errors,
            "ranges": ranges,
            "ratio_at_6": ratio,
            "pointer_error": pointers,
            "parameters": sizes,
        },
        expected=(
            "At [-6, 6] the median error of positional attention is at most a tenth of the standard one's, in every "
            "task; and the standard one's error on pointers is on every seed less than half of the positional one's."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            "Median squared errors, positional against standard: "
            + "; ".join(
                f"{task} {found['positional'][0]:.2g} and {found['standard'][0]:.2g} in the trained range, "
                f"{found['positional'][at]:.2g} and {found['standard'][at]:.2g} at [-6, 6], "
                f"{found['positional'][-1]:.2g} and {found['standard'][-1]:.2g} at [-{ranges[-1]}, {ranges[-1]}]"
                for task, found in median.items()
            )
            + f"; pointers {np.median(pointers['positional']):.2g} and {np.median(pointers['standard']):.2g}."
        ),
        model=f"positional and standard transformers of width {width}, trained for {steps} steps",
        seeds=list(seeds),
    )


def fit(kind: type[nn.Module], sizes: tuple[int, ...], made: dict, draw: Draw, steps: int, seed: int) -> nn.Module:
    model = build(lambda: kind(*sizes, **made), seed)
    return train(model, draw, Recipe(steps, 2e-3, warmup=steps // 10, decay="cosine", seed=seed)).model


def picked(x: Tensor, y: Tensor, rows: int) -> Draw:
    """Batches out of fixed samples."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(x), (rows,), generator=generator)
        return {"x": x[chosen, :, None], "labels": y[chosen, :, None]}

    return draw


def pointed(n: int, rows: int) -> Draw:
    """Every node holds a number and the one-hot name of a node, whose number is asked."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        value = TRAINED * (2 * torch.rand(rows, n, generator=generator) - 1)
        named = torch.randint(n, (rows, n), generator=generator)
        x = torch.cat([value[..., None], nn.functional.one_hot(named, n)], -1)
        return {"x": x, "labels": value.gather(1, named)[..., None]}

    return draw


@torch.no_grad()
def error(model: nn.Module, task: str, n: int, high: float) -> float:
    """The mean squared error on 4,096 rows of a seed of their own, beyond the trained range where `high` is."""
    generator = torch.Generator().manual_seed(10_000 + int(high))
    x = spread(4096, n, high, generator, TRAINED if high > TRAINED else None)
    return model(x[..., None], labels=TASKS[task](x)[..., None]).loss.item()
