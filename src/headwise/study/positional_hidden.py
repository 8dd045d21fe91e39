"""Does scaling a positional channel for the last token flatten the curve of a model that is lost in the middle?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from headwise.attention import Mass, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened, open_model
from headwise.scan.needles import haystack
from headwise.scan.positional_channels import positional_channels as search
from headwise.steer import Method, PositionalHiddenScaling, apply
from headwise.steer.choices import many_logprobs
from headwise.study import tasks
from headwise.study.evaluate import interval, perplexity
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.tasks import Example

DEPTHS = 5
WORDS = tuple(
    sorted({*tasks.JOBS, *tasks.OBJECTS, *tasks.COLOURS, *tasks.PLACES, *tasks.GIFTS, *tasks.THINGS} - {"key"})
)


@study(
    "positional_hidden_scaling",
    paper=PositionalHiddenScaling.paper,
    room="steer",
    claim="Scaling one positional channel for the last token makes retrieval depend less on where the answer stands.",
)
def positional_hidden_scaling(
    model: Any = "zoo:llm",
    seeds: Sequence[int] = (0, 1),
    per_depth: int = 6,
    calibration: int = 2,
    items: int = 24,
    samples: int = 6,
    length: int = 1000,
    skip: int = 300,
    smooth_skip: int = 200,
    topk: int = 10,
) -> Finding:
    """Lists of keys and words, the key asked for at five depths. Channel and factor are chosen on `calibration` lists a
    depth from the scan's `topk` channels, by the answer's log-probability; judged on `per_depth` other lists of every
    seed. Placebo: two channels drawn from those the scan did not find, with the same factor and layers. Perplexity is
    that of text in which every token asks scaled, which is more than the method does."""
    opened = model if isinstance(model, Opened) else open_model(model)
    found = search(opened, samples=samples, length=length, skip=skip, smooth_skip=smooth_skip, topk=topk)
    if not found.channels:
        return Finding(
            measured={"candidates": 0},
            expected="A channel that the scan finds.",
            verdict="untestable",
            reason="No channel of this model is monotonic in position in enough of its layers.",
            model=opened.name,
            seeds=list(seeds),
        )
    start = PositionalHiddenScaling(found.channels[0], layers=found.layers)
    words = one_token_words(opened)
    method = start.calibrate(opened, lists(1000, calibration, items, words), found.channels)
    monotonic = set(found.table["channel"])
    width = next(site for site in opened.sites if site.stream == "text").W_Q.shape[1]
    others = [c for c in np.random.default_rng(7).permutation(width).tolist() if c not in monotonic][:2]
    factor = method.factor if method.factor != 1 else 0.0
    placebo = [replace(method, channel=c, factor=factor) for c in others]
    examples = [example for seed in seeds for example in lists(seed, per_depth, items, words)]
    logp = {"plain": answers(opened, examples), "scaled": answers(opened, examples, method)}
    logp |= {f"channel {m.channel}": answers(opened, examples, m) for m in placebo}
    places = np.array([example.place for example in examples])
    change = {name: spread_change(x, logp["plain"], places) for name, x in logp.items() if name != "plain"}
    mean = {name: interval(x - logp["plain"])._asdict() for name, x in logp.items() if name != "plain"}
    middle = [e for e in examples if e.place == DEPTHS // 2]
    mass = {"plain": on_answer(opened, middle, start), "scaled": on_answer(opened, middle, start, method)}
    text = haystack()
    every = replace(method, last_rows=10**6)
    least = min(change[name]["mean"] for name in change if name != "scaled")
    holds = change["scaled"]["high"] < 0 <= mean["scaled"]["high"] and change["scaled"]["mean"] < least
    curve = {name: [float(x[places == d].mean()) for d in range(DEPTHS)] for name, x in logp.items()}
    spread = {name: max(row) - min(row) for name, row in curve.items()}
    drawn = ", ".join(f"{c['mean']:+.2f}" for name, c in change.items() if name != "scaled")
    return Finding(
        measured={
            "channel": method.channel,
            "factor": method.factor,
            "layers": found.layers,
            "candidates": found.channels,
            "logp_by_depth": curve,
            "spread": spread,
            "spread_change": change,
            "mean_change": mean,
            "mass_on_the_answer_in_the_middle": {name: float(x.mean()) for name, x in mass.items()},
            "mass_change": interval(mass["scaled"] - mass["plain"])._asdict(),
            "perplexity": {"plain": perplexity(opened, text), "every token scaled": perplexity(opened, text, [every])},
            "lists": len(examples),
        },
        expected=(
            "On other lists than the channel was chosen on, the spread over depths (highest less lowest mean "
            "log-probability of the answer) falls (95% interval below 0) and by more than with either channel drawn, "
            "and the mean log-probability does not fall (95% interval not below 0)."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Channel {method.channel} times {method.factor:g}: the spread over depths goes from {spread['plain']:.2f} "
            f"to {spread['scaled']:.2f} nats (change {change['scaled']['low']:.2f} to {change['scaled']['high']:.2f}; "
            f"channels drawn {drawn}), the mean "
            f"changes by {mean['scaled']['mean']:+.3f} ({mean['scaled']['low']:+.3f} to {mean['scaled']['high']:+.3f})."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def one_token_words(opened: Opened) -> list[str]:
    """Words that the model reads as one token, so that all options of a list share a pass."""
    return [w for w in WORDS if len(opened.tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) == 1]


def lists(seed: int, per_depth: int, items: int, known: Sequence[str] = WORDS) -> list[Example]:
    """`per_depth` lists for each of five depths of the pair asked for, whose segment is "gold"."""
    if len(known) < items:
        raise HeadwiseError(f"items: there are {len(known)} words of one token for a list; got {items}.")
    rng = np.random.default_rng(seed)
    made = []
    for number in range(DEPTHS * per_depth):
        depth = number % DEPTHS
        gold = round(depth * (items - 1) / (DEPTHS - 1))
        words = rng.permutation(known)[:items].tolist()
        numbers = rng.permutation(90)[:items] + 10
        keys = [f"{a}{n}" for a, n in zip(rng.choice(list("BCDFGHJKLM"), items), numbers, strict=True)]
        text, spans = "", {}
        for n, (key, word) in enumerate(zip(keys, words, strict=True)):
            line = f"key {key}: {word}\n"
            if n == gold:
                spans = {"gold": (len(text), len(text) + len(line) - 1)}
            text += line
        prompt = f"{text}key {keys[gold]}:"
        made.append(Example(prompt, tuple(f" {w}" for w in words), gold, spans, depth))
    return made


def answers(opened: Opened, examples: Sequence[Example], *methods: Method) -> Float[np.ndarray, " example"]:
    """Log-probability of the right word."""
    if methods:
        with apply(opened, *methods):
            found = many_logprobs(opened, examples)
    else:
        found = many_logprobs(opened, examples)
    return np.array([float(p[e.gold]) for p, e in zip(found, examples, strict=True)])


def spread_change(
    after: Float[np.ndarray, " example"],
    before: Float[np.ndarray, " example"],
    places: Float[np.ndarray, " example"],
    draws: int = 2000,
) -> dict[str, float]:
    """How the highest less the lowest mean over depths changes, with its 95% bootstrap interval: lists are drawn again
    within each depth, the same for both."""
    rng = np.random.default_rng(0)
    groups = [np.flatnonzero(places == d) for d in np.unique(places)]

    def spread(x: np.ndarray, rows: Sequence[np.ndarray]) -> float:
        means = [x[row].mean() for row in rows]
        return max(means) - min(means)

    drawn = [[rng.choice(g, len(g)) for g in groups] for _ in range(draws)]
    low, high = np.quantile([spread(after, rows) - spread(before, rows) for rows in drawn], [0.025, 0.975])
    return {"mean": spread(after, groups) - spread(before, groups), "low": float(low), "high": float(high)}


def on_answer(
    opened: Opened, examples: Sequence[Example], where: PositionalHiddenScaling, *methods: Method
) -> Float[np.ndarray, " example"]:
    """The last token's attention to the pair asked for, mean over heads of the layers that are scaled."""
    layers = [site.layer for site in where.sites(opened)]
    reading = Mass("gold", layers=layers, queries=[-1], stream="text")
    found = []
    for example in examples:
        parts = example.segments(opened)
        with ExitStack() as stack:
            if methods:
                stack.enter_context(apply(opened, *methods, segments=parts))
            run = stack.enter_context(attend(opened, [reading], segments=parts))
            with torch.no_grad():
                opened.model(**opened.encode(example.prompt))
        found.append(float(run.tree["text"]["mass"].mean()))
    return np.array(found)
