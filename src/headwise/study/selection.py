"""What sum-to-one weights can't do: how fast they vanish with length, what they keep apart, how steep they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise import scan
from headwise.attention import Map, attend
from headwise.models import Opened, open_model
from headwise.scan.needs import quiet
from headwise.scan.selection import expected_distance, selection, softmax_jacobian_norm
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.sinks import windows

PAPER = scan.SelectionCapacity.paper


@torch.no_grad()
def last_rows(opened: Opened, length: int, texts: int) -> Float[Tensor, "text layer head key"]:
    """The weights of the last query in windows of the prose."""
    rows = []
    for ids in windows(opened, texts, length):
        with attend(opened, [Map(queries=[-1], stream="text")]) as run:
            opened.model(input_ids=ids[None].to(opened.device), **quiet(opened.model))
        seen = run.tree["text"]["map"].isel(sample=0, query=-1).transpose("layer", "head", "key")
        rows.append(torch.as_tensor(seen.values).double())
    return torch.stack(rows)


@study(
    "selection_limits",
    paper=PAPER,
    room="scan",
    claim="Attention can keep at most some 80% of what it selects apart, and its weights vanish as the text grows.",
)
def selection_limits(
    model: Any = "zoo:llm",
    lengths: Sequence[int] = (64, 256, 1024),
    texts: int = 4,
    top: Sequence[int] = (5, 16, 61, 256),
) -> Finding:
    """The first token is left out throughout: as a sink it would be most of what is seen. Weights: the slope, over
    lengths, of the log of the last query's largest weight (the median over heads; softmax over bounded scores gives
    -1). Separable share and distances: the longest window, at N = 5 and at 1.6%, 6% and 25% of 1,024 tokens."""
    opened = model if isinstance(model, Opened) else open_model(model)
    largest, mean = [], []
    for length in lengths:
        rows = last_rows(opened, length, texts)[..., 1:]
        largest.append(rows.amax(-1).log().mean(0).flatten())
        mean.append(rows.mean(-1).log().mean(0).flatten())
    x = np.log(lengths)
    slopes, mean_slopes = (np.polyfit(x, torch.stack(y).numpy(), 1)[0] for y in (largest, mean))
    question = scan.SelectionCapacity(n=top[0], top=tuple(top))
    inputs = [{"input_ids": ids[None].to(opened.device)} for ids in windows(opened, 2, max(lengths))]
    found = scan.heads(opened, inputs=inputs, questions=[question]).data.sel(stream="text")
    curves = {
        m: found[f"selection_curve_{m}_rest"].mean(("layer", "head")).values for m in ("separable", "distance_mean")
    }
    separable, distance = curves["separable"], curves["distance_mean"]
    holds = float(np.median(slopes)) < -0.5 and max(separable) < 0.9 and distance[3] < distance[2] / 2
    return Finding(
        measured={
            "slope_of_largest": np.median(slopes),
            "slope_of_mean": np.median(mean_slopes),
            "top": list(top),
            "separable": separable,
            "distance_mean": distance,
        },
        expected=(
            "Largest weight falling faster than length^-0.5, never more than 90% separable, and the mean distance to "
            "the unselected at 25% below half of that at 6%."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"The median head's largest weight goes as length^{np.median(slopes):.2f}; separable at N = "
            f"{', '.join(map(str, top))}: {', '.join(f'{s:.0%}' for s in separable)}; mean distance "
            f"{', '.join(f'{d:.2g}' for d in distance)} (half at 25% of the text: {distance[3] < distance[2] / 2})."
        ),
        model=opened.name,
    )


@study(
    "softmax_gradient",
    paper=PAPER,
    room="scan",
    claim="The softmax's gradient grows as 1/T with falling temperature, and never beyond 1/(2T).",
)
def softmax_gradient(model: Any = "zoo:llm", length: int = 128, texts: int = 4, seed: int = 0) -> Finding:
    """Spectral norm of the Jacobian of softmax(l / T) for T from 0.01 to 10: for normal scores of 64 keys, and for the
    scores of real rows (the last queries' log weights). The slope on log-log axes is the median row's between T = 0.1
    and 1. A finite difference in a random direction stands beside the bound."""
    opened = model if isinstance(model, Opened) else open_model(model)
    draw = torch.Generator().manual_seed(seed)
    real = last_rows(opened, length, texts).flatten(0, 2).clamp(min=1e-30).log()
    normal = torch.randn(500, 64, generator=draw, dtype=torch.float64)
    temperatures = np.geomspace(0.01, 10, 13)
    curves: dict[str, list[float]] = {}
    within = True
    for name, scores in (("normal", normal), ("real", real)):
        for t in temperatures:
            norm = softmax_jacobian_norm(torch.softmax(scores / t, -1), t)
            step = 1e-6 * torch.randn(scores.shape, generator=draw, dtype=torch.float64)
            moved = torch.softmax((scores + step) / t, -1) - torch.softmax(scores / t, -1)
            ratio = moved.norm(dim=-1) / step.norm(dim=-1)
            within &= bool((norm <= 1 / (2 * t) + 1e-9).all()) and bool((ratio <= norm * (1 + 1e-3) + 1e-6).all())
            curves.setdefault(name, []).append(norm.median().item())
    some = (temperatures >= 0.1) & (temperatures <= 1)
    slopes = {
        n: float(np.polyfit(np.log(temperatures[some]), np.log(np.array(c)[some] + 1e-300), 1)[0])
        for n, c in curves.items()
    }
    holds = within and all(-1.3 <= slope <= -0.7 for slope in slopes.values())
    return Finding(
        measured={
            "temperatures": temperatures,
            **{f"norm_{n}": c for n, c in curves.items()},
            "slopes": slopes,
            "within_bound": within,
        },
        expected="A slope between -1.3 and -0.7 for normal and for real scores, and no row above 1/(2T).",
        verdict="holds" if holds else "fails",
        reason=(
            f"Between T = 0.1 and 1 the norm goes as T^{slopes['normal']:.2f} for normal scores and "
            f"T^{slopes['real']:.2f} for real ones; the bound holds for {'every row' if within else 'not every row'}. "
            "Where one score leads, a low temperature makes the weights one-hot and the gradient 0."
        ),
        model=opened.name,
        seeds=[seed],
    )


def sparsemax(scores: Float[Tensor, "*row key"]) -> Float[Tensor, "*row key"]:
    """The nearest point of the simplex: `max(l - tau, 0)` with the tau that makes the sum 1."""
    ordered = scores.sort(-1, descending=True).values
    count = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype)
    total = ordered.cumsum(-1) - 1
    kept = (ordered * count > total).sum(-1, keepdim=True)
    return (scores - total.gather(-1, kept - 1) / kept).clamp(min=0)


def top_softmax(scores: Float[Tensor, "*row key"], keep: int = 8) -> Float[Tensor, "*row key"]:
    """Softmax over the 8 largest scores, 0 elsewhere."""
    least = scores.topk(keep, -1).values[..., -1:]
    return torch.softmax(scores.masked_fill(scores < least, -torch.inf), -1)


@study(
    "normalisation_kinds",
    paper=PAPER,
    room="scan",
    claim="With bounded scores the largest weight of a softmax vanishes as 1/L; top-k and sparsemax keep theirs.",
)
def normalisation_kinds(
    lengths: Sequence[int] = (64, 256, 1024, 4096), rows: int = 200, seeds: Sequence[int] = (0, 1, 2)
) -> Finding:
    """Scores uniform in [-2, 2]; slopes of the log of the mean largest weight over log L. Beside: every softmax weight
    within `e^(-2D)/L` and `e^(2D)/L`, and the mean distance of the softmax's top 6% to the rest, for unit vectors,
    against what a random selection of the same size expects."""
    bound = 2.0
    kinds = {"softmax": lambda x: torch.softmax(x, -1), "sparsemax": sparsemax, "top8": top_softmax}
    largest = {kind: np.zeros((len(seeds), len(lengths))) for kind in kinds}
    within, chosen, random = True, [], []
    for row, seed in enumerate(seeds):
        draw = torch.Generator().manual_seed(seed)
        for column, length in enumerate(lengths):
            scores = (2 * torch.rand(rows, length, generator=draw, dtype=torch.float64) - 1) * bound
            for kind, weigh in kinds.items():
                largest[kind][row, column] = weigh(scores).amax(-1).mean().item()
            alpha = torch.softmax(scores, -1)
            within &= bool(((alpha * length).log().abs() <= 2 * bound).all())
        vectors = torch.nn.functional.normalize(
            torch.randn(lengths[1], 64, generator=draw, dtype=torch.float64), dim=-1
        )
        row_of = torch.softmax(scores[:1, : lengths[1]], -1)
        n = max(1, round(0.06 * lengths[1]))
        chosen.append(selection(row_of, vectors, n)["distance_mean"].item())
        random.append(expected_distance(row_of[0], vectors, n) ** 0.5)
    slopes = {kind: float(np.polyfit(np.log(lengths), np.log(x.mean(0)), 1)[0]) for kind, x in largest.items()}
    holds = within and slopes["softmax"] < -0.8 and all(slopes[kind] > -0.3 for kind in ("sparsemax", "top8"))
    return Finding(
        measured={
            "slopes": slopes,
            "largest": {kind: x.mean(0) for kind, x in largest.items()},
            "within_bounds": within,
            "distance_top": np.mean(chosen),
            "distance_random_rms": np.mean(random),
        },
        expected="Slopes below -0.8 for softmax, above -0.3 for sparsemax and top-8; all weights within the bounds.",
        verdict="holds" if holds else "fails",
        reason="The largest weight goes as "
        + ", ".join(f"L^{s:.2f} ({kind})" for kind, s in slopes.items())
        + ": the more scores lie near the top, the more of them sparsemax keeps.",
        model=f"scores uniform in [-{bound:g}, {bound:g}]",
        seeds=seeds,
    )
