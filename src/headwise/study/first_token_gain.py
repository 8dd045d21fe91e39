"""Does tuning how much heads look at the first token make a language model classify better?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened, Segments, open_model
from headwise.paper import Paper
from headwise.scan.needles import haystack
from headwise.scan.word_pairs import relation
from headwise.steer import Method, TokenScale, ZeroTuning, apply
from headwise.steer.choices import many_logprobs
from headwise.steer.method import every_head
from headwise.steer.zero_tuning import GRID
from headwise.study import tasks
from headwise.study.evaluate import perplexity
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.tasks import Example

PAPER = Paper(
    "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training", "2505.11739"
)
Heads = list[tuple[int, int]]


def kinds(seed: int) -> list[Example]:
    """What kind of thing is it: every word in two frames, in random order."""
    pairs = relation("superclass").pairs
    options = tuple(dict.fromkeys(f" {kind}" for _, kind in pairs))
    frames = ("Q: What kind of thing is this: {}?\nA: It is a kind of", "Here {} means a kind of")
    found = [Example(f.format(word), options, options.index(f" {kind}")) for word, kind in pairs for f in frames]
    random.Random(seed).shuffle(found)
    return found


def topics(seed: int) -> list[Example]:
    """The sentences of `tasks.topic`, each once."""
    return list({example.prompt: example for example in tasks.topic(seed, 500)}.values())


TASKS: dict[str, Callable[[int], list[Example]]] = {"topic": topics, "kind": kinds}


@study(
    "zero_tuning_accuracy",
    paper=PAPER,
    room="steer",
    claim="With the gain of the first token tuned for the heads that profit, a model classifies better.",
)
def zero_tuning_accuracy(
    model: Any = "zoo:llm",
    seeds: Sequence[int] = (0, 1),
    calibration: int = 24,
    held_out: int = 64,
    grid: Sequence[float] = GRID,
    draws: int = 2,
) -> Finding:
    """Two zero-shot classification tasks. On the calibration sentences the heads (head numbers over all layers, the
    paper's way; half of them) and their gain are chosen by the log-probability of the right labels; so is one gain for
    all heads. On other sentences: the change of accuracy, and of the right label's log-probability among the labels,
    against the plain model, the same gain on as many random other head numbers, and the gain for all. Beside it the
    heads by one backward pass, and the perplexity of English prose."""
    opened = model if isinstance(model, Opened) else open_model(model)
    rows: list[dict[str, Any]] = []
    scores: dict[str, list[Float[np.ndarray, "example 2"]]] = {}
    plain_perplexity = perplexity(opened, haystack(), length=128, windows=3)
    for seed in seeds:
        for task, make in TASKS.items():
            examples = make(seed)
            if len(examples) < calibration + held_out:
                raise HeadwiseError(f"held_out: the task {task} has {len(examples)} examples in all.")
            learn, held = examples[:calibration], examples[calibration : calibration + held_out]
            tuned = ZeroTuning().calibrate(opened, learn, mode="likelihood", grid=grid)
            curve = ZeroTuning().curve(opened, learn, mode="likelihood", grid=grid)
            slopes = ZeroTuning().calibrate(opened, learn, "likelihood", "head", grid=grid, probe="gradient")
            settings = {
                "plain": [],
                "tuned": [tuned],
                "all_heads": [ZeroTuning(gain=max(curve, key=lambda g: (curve[g], -abs(g - 1))))],
                "by_gradient": [slopes],
            }
            for draw in range(draws):
                heads = other_numbers(opened, tuned, seed * 10 + draw)
                settings[f"random_{draw}"] = [ZeroTuning(gain=tuned.gain, heads=heads)]
            for name, methods in settings.items():
                scores.setdefault(name, []).append(answers(opened, held, methods))
            rows.append(
                {
                    "task": task,
                    "seed": seed,
                    "heads": sorted({head for _, head in tuned.heads or ()}),
                    "gain": tuned.gain,
                    "gain_all_heads": settings["all_heads"][0].gain,
                    "gain_by_gradient": slopes.gain,
                    "likelihood_by_gain": curve,
                    "accuracy": {name: scores[name][-1][:, 0].mean() for name in settings},
                    "perplexity_factor": perplexity(opened, haystack(), [tuned], length=128, windows=3)
                    / plain_perplexity,
                }
            )
    joined = {name: np.concatenate(found) for name, found in scores.items()}
    change = {name: interval(found - joined["plain"]) for name, found in joined.items() if name != "plain"}
    gain, random_gain = change["tuned"], np.mean([change[f"random_{draw}"][0] for draw in range(draws)], 0)
    better = gain[1][0] > 0 and gain[0][0] >= change["all_heads"][0][0] and gain[0][0] > random_gain[0]
    return Finding(
        measured={
            "accuracy_plain": joined["plain"][:, 0].mean(),
            "change": {
                name: {"accuracy": [mean[0], low[0], high[0]], "log_probability": [mean[1], low[1], high[1]]}
                for name, (mean, low, high) in change.items()
            },
            "tasks": rows,
            "examples": len(joined["plain"]),
        },
        expected="Accuracy on held-out sentences rises with 95% certainty, at least as much as with one gain for all "
        "heads and more than with the same gain on random heads.",
        verdict="holds" if better else "fails",
        reason=(
            f"On {len(joined['plain'])} held-out sentences accuracy goes from {joined['plain'][:, 0].mean():.1%} by "
            f"{gain[0][0]:+.1%} ({gain[1][0]:+.1%} to {gain[2][0]:+.1%}), with one gain for all heads by "
            f"{change['all_heads'][0][0]:+.1%}, on random heads by {random_gain[0]:+.1%}; the log-probability of the "
            f"right label by {gain[0][1]:+.3f} nats (random heads {random_gain[1]:+.3f}); perplexity of prose times "
            f"{np.mean([row['perplexity_factor'] for row in rows]):.2f}."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def answers(opened: Opened, examples: Sequence[Example], methods: Sequence[Method]) -> Float[np.ndarray, "example 2"]:
    """Of every example: is it right, and the right label's log-probability among the labels."""
    if methods:
        with apply(opened, *methods):
            found = many_logprobs(opened, examples)
    else:
        found = many_logprobs(opened, examples)
    gold = [example.gold or 0 for example in examples]
    return np.array([[int(p.argmax()) == g, float(p.log_softmax(-1)[g])] for p, g in zip(found, gold, strict=True)])


def other_numbers(opened: Opened, tuned: ZeroTuning, seed: int) -> Heads:
    """As many random head numbers as the method has, none of its own as far as there are others."""
    own = sorted({head for _, head in tuned.heads or ()})
    every = every_head(opened)
    others = sorted({head for _, head in every} - set(own))
    drawn = random.Random(seed).sample(others, min(len(own), len(others)))
    return [pair for pair in every if pair[1] in drawn]


def interval(
    change: Float[np.ndarray, "example measure"], draws: int = 2000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, and 95% bootstrap interval over examples."""
    chosen = np.random.default_rng(0).integers(len(change), size=(draws, len(change)))
    low, high = np.quantile(change[chosen].mean(1), [0.025, 0.975], axis=0)
    return change.mean(0), low, high


@study(
    "zero_tuning_entropy",
    paper=PAPER,
    room="steer",
    claim="The gain of the first token that makes answers most certain is near the one that makes them most right.",
)
def zero_tuning_entropy(
    model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1), examples: int = 48, grid: Sequence[float] = GRID
) -> Finding:
    """For all heads at once: accuracy, the right label's log-probability and the labels' entropy at every gain; the
    rank correlation of accuracy and entropy over gains, and the accuracy that the gain of least entropy gets. Beside
    it the perplexity of prose at every gain of the first token, and of the second one for comparison."""
    opened = model if isinstance(model, Opened) else open_model(model)
    rows = []
    for seed in seeds:
        for task, make in TASKS.items():
            chosen = make(seed)[:examples]
            curves = np.array([curve_point(opened, chosen, gain) for gain in grid])
            accuracy, likelihood, entropy = curves.T
            rows.append(
                {
                    "task": task,
                    "seed": seed,
                    "accuracy": accuracy,
                    "log_probability": likelihood,
                    "entropy": entropy,
                    "rank_correlation": rank(accuracy, entropy),
                    "rank_correlation_log_probability": rank(likelihood, entropy),
                    "accuracy_at_least_entropy": accuracy[entropy.argmin()],
                    "accuracy_plain": accuracy[list(grid).index(1.0)],
                }
            )
    correlations = [row["rank_correlation"] for row in rows]
    spread = [np.ptp(row["accuracy"]) for row in rows]
    chosen_by_entropy = [row["accuracy_at_least_entropy"] - row["accuracy_plain"] for row in rows]
    holds = all(c < -0.5 for c in correlations)
    return Finding(
        measured={
            "gains": list(grid),
            "tasks": rows,
            "spread_of_accuracy": spread,
            "perplexity": {
                name: [prose_perplexity(opened, gain, place) for gain in grid]
                for name, place in (("first token", 0), ("second token", 1))
            },
        },
        expected="A rank correlation of accuracy and entropy over the gains below -0.5 in every task and seed.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Rank correlations of accuracy and entropy are {', '.join(f'{c:+.2f}' for c in correlations)}; over the "
            f"gains accuracy spans {np.mean(spread):.1%} on average; the gain of least entropy changes it by "
            f"{np.mean(chosen_by_entropy):+.1%}."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def rank(one: Float[np.ndarray, " gain"], other: Float[np.ndarray, " gain"]) -> float:
    """Spearman's correlation; 0 where one of them is the same at every gain."""
    if not np.ptp(one) or not np.ptp(other):
        return 0.0
    return float(need("scipy.stats", "analysis").spearmanr(one, other).statistic)


def prose_perplexity(opened: Opened, gain: float, place: int = 0, heads: Heads | None = None) -> float:
    """Perplexity of a novel, with this gain on one token of every window; 1 is the plain model."""
    segments = Segments.from_spans({"token": (place, place + 1)}, 128)
    return perplexity(opened, haystack(), [TokenScale("token", gain, heads)], 128, windows=3, segments=segments)


def curve_point(opened: Opened, examples: Sequence[Example], gain: float) -> list[float]:
    """Accuracy, log-probability of the right label, entropy (nats)."""
    with apply(opened, TokenScale(gain=gain)):
        found = [p.log_softmax(-1) for p in many_logprobs(opened, examples)]
    gold = [example.gold or 0 for example in examples]
    right = [int(p.argmax()) == g for p, g in zip(found, gold, strict=True)]
    logp = [float(p[g]) for p, g in zip(found, gold, strict=True)]
    entropy = [float(-torch.special.xlogy(p.exp(), p.exp()).sum()) for p in found]
    return [float(np.mean(x)) for x in (right, logp, entropy)]
