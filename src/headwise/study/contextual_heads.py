"""Contextual heads: are they few and stable, and does the answer come easier when they look at the right document, told
which one it is (split softmax) or not (focus directions)?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from headwise import scan, steer
from headwise.attention import Mass, attend
from headwise.extras import need
from headwise.models import Opened, Segments, open_model
from headwise.scan.needles import haystack
from headwise.study import tasks
from headwise.study.evaluate import Difference, difference, evaluate, interval, perplexity, steered
from headwise.study.finding import Finding
from headwise.study.registry import study

PAPER = steer.FocusDirections.paper
TOP = 20
TAUS = (0.3, 0.5, 0.7)
ALPHAS = (-0.2, 0.1, 0.2, 0.3, 0.5)
ITEMS = 6
Heads = list[tuple[int, int]]


@study(
    "contextual_heads",
    paper=PAPER,
    room="scan",
    claim="Few heads hold most of the attention that an answer gives to the document it comes from, the same for other "
    "questions.",
)
def contextual_heads(model: Any = "zoo:llm", prompts: int = 16) -> Finding:
    """Mass of the answer on the right one of 8 documents, on two disjoint halves of the prompts. Control: the same
    heads' mean mass on one of the other documents."""
    opened = model if isinstance(model, Opened) else open_model(model)
    halves = [scored(opened, prompts // 2, first) for first in (0, prompts // 2)]
    one, two = (half["contextual_heads"] for half in halves)
    count = max(1, round(0.05 * len(one)))
    top = one.nlargest(count).index
    concentration = float(two[top].mean() / two.mean())
    others = halves[1]["context_others"][top].mean() / (scan.ContextualHeads().documents - 1)
    agreement = float(need("scipy.stats", "analysis").spearmanr(one, two).statistic)
    shared = len(set(top) & set(two.nlargest(count).index))
    return Finding(
        measured={
            "spearman": agreement,
            "top_over_mean": concentration,
            "top_mass": two[top].mean(),
            "top_mass_other_document": others,
            "top_sink": halves[1]["context_sink"][top].mean(),
            "heads": pairs(halves[0].loc[top]),
            "shared_top": shared,
            "prompts": prompts,
        },
        expected="The top 5% of heads of one half have over 3 times the mean on the other; Spearman above 0.8.",
        verdict="holds" if concentration > 3 and agreement > 0.8 else "fails",
        reason=(
            f"The top {count} heads of one half give {two[top].mean():.2f} to the right document on the other, "
            f"{concentration:.1f} times the mean of all heads ({others:.3f} to another document); Spearman of the "
            f"halves {agreement:.2f}, {shared} of the top {count} are the same."
        ),
        model=opened.name,
    )


def scored(opened: Opened, prompts: int, first: int = 0) -> pd.DataFrame:
    """A row a head: `scan.ContextualHeads` on prompts from this seed on."""
    return scan.heads(opened, questions=[scan.ContextualHeads(prompts_asked=prompts, first_seed=first)]).heads


def pairs(table: pd.DataFrame) -> Heads:
    return [(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]


def top_heads(opened: Opened, prompts: int, count: int = TOP) -> tuple[Heads, Heads]:
    """The best contextual heads, and all others."""
    ranked = pairs(scored(opened, prompts, first=1000).sort_values("contextual_heads", ascending=False, kind="stable"))
    return ranked[:count], ranked[count:]


@study(
    "split_softmax",
    paper=PAPER,
    room="steer",
    claim="More attention of the contextual heads to the right document makes its answer more probable.",
)
def split_softmax(
    model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), count: int = 8, calibration: int = 8, heads: int = TOP
) -> Finding:
    """The mass p of the last token on the right document made p^tau in the top heads; tau is chosen on other prompts.
    Placebos: the same in random other heads, and for another document. Beside it p^(1/tau), which lowers it, and the
    loss of ordinary text behind a span that is raised so."""
    opened = model if isinstance(model, Opened) else open_model(model)
    top, rest = top_heads(opened, 2 * calibration, heads)

    def gold(tau: float, chosen: Heads, away: int = 0) -> Any:
        def methods(example: tasks.Example) -> list[steer.Method]:
            name = f"document {(example.place + away) % ITEMS + 1}"
            return [steer.SplitSoftmax(name, tau, heads=tuple(chosen), queries="last")]

        return methods

    chosen = tasks.documents(100, calibration, ITEMS)
    table = evaluate(opened, chosen, {str(tau): gold(tau, top) for tau in TAUS})
    tried = {tau: difference(table, str(tau)).mean for tau in TAUS}
    tau = max(TAUS, key=lambda t: tried[t])
    draws = {f"random {n}": random.Random(n).sample(rest, heads) for n in range(3)}
    settings = {"raised": gold(tau, top), "lowered": gold(1 / tau, top), "other document": gold(tau, top, away=3)}
    settings |= {name: gold(tau, drawn) for name, drawn in draws.items()}
    table = evaluate(opened, [e for seed in seeds for e in tasks.documents(seed, count, ITEMS)], settings)
    change = {name: difference(table, name) for name in settings}
    beyond = over_mean(table, "raised", list(draws))
    holds = change["raised"].low > 0 and beyond.low > 0
    means = table.groupby("setting", sort=False)[["logp", "right"]].mean()
    return Finding(
        measured={
            "logp": means["logp"].to_dict(),
            "accuracy": means["right"].to_dict(),
            "change": change,
            "rise_over_random_heads": beyond,
            "tau": tau,
            "rise_on_calibration_prompts": tried,
            "heads": top,
            "perplexity": {
                "plain": after_span(opened),
                "raised": after_span(opened, steer.SplitSoftmax("span", tau, tuple(top), "tail")),
            },
            "prompts": len(seeds) * count,
        },
        expected="The log-probability rises with 95% certainty, and more than in random heads with 95% certainty.",
        verdict="holds" if holds else "fails",
        reason=(
            f"With tau {tau} in {heads} heads it changes by {said(change['raised'])} nats, "
            f"{said(beyond)} above random heads; with {1 / tau:.1f} by {said(change['lowered'])}, for another document "
            f"by {said(change['other document'])}."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def over_mean(table: pd.DataFrame, setting: str, others: Sequence[str], measure: str = "logp") -> Difference:
    """How far a setting is above the mean of others, over the same examples."""
    wide = table.pivot(index="example", columns="setting", values=measure)
    return interval((wide[setting] - wide[list(others)].mean(axis=1)).to_numpy())


def said(found: Difference) -> str:
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def after_span(opened: Opened, method: steer.Method | None = None) -> float:
    """Perplexity of 32 tokens of a novel behind 128 others, of which a span of 16 is named."""
    segments = Segments.from_spans({"span": (56, 72), "tail": (127, 160)}, 160)
    return perplexity(
        opened, haystack(), [] if method is None else [method], 160, windows=6, segments=segments, start=128
    )


@study(
    "focus_directions",
    paper=PAPER,
    room="steer",
    claim="Learnt directions turn contextual heads from the sink to the relevant document, on questions not seen, and "
    "make the answer more probable.",
)
def focus_directions(
    model: Any = "zoo:llm",
    seeds: Sequence[int] = (0, 1, 2),
    count: int = 6,
    calibration: int = 6,
    training: int = 24,
    heads: int = TOP,
    epochs: int = 20,
    lr: float = 1e-2,
) -> Finding:
    """Directions are learnt on `training` prompts with their answers, used in the top heads for all tokens; alpha is
    chosen on other prompts among positive ones, and judged on further ones beside the whole curve. Few examples make
    few steps, so that lr is above the paper's 0.001. Placebos: random directions of the same lengths, and the learnt
    ones in as many random heads. Masses are those of the last token in the top heads."""
    opened = model if isinstance(model, Opened) else open_model(model)
    top, rest = top_heads(opened, 2 * calibration, heads)
    examples = [focus(opened, e) for e in tasks.documents(200, training, ITEMS)]
    learnt = steer.FocusDirections(heads=tuple(top)).calibrate(opened, examples, epochs=epochs, lr=lr)
    assert learnt.directions is not None
    noise = torch.randn(learnt.directions.shape, generator=torch.Generator().manual_seed(0))
    noise *= learnt.directions.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    chosen = tasks.documents(100, calibration, ITEMS)
    table = evaluate(opened, chosen, {str(a): [replace(learnt, alpha=a)] for a in ALPHAS if a > 0})
    tried = {a: difference(table, str(a)).mean for a in ALPHAS if a > 0}
    best = max(tried, key=lambda a: tried[a])
    settings = {str(a): replace(learnt, alpha=a) for a in ALPHAS} | {
        "random direction": replace(learnt, directions=noise, alpha=best),
        "random heads": replace(learnt, heads=tuple(random.Random(0).sample(rest, heads)), alpha=best),
    }
    held = [e for seed in seeds for e in tasks.documents(seed, count, ITEMS)]
    table = evaluate(opened, held, {name: [method] for name, method in settings.items()})
    change = {name: difference(table, name) for name in settings}
    beyond = difference(table, str(best), against="random direction")
    plain, focused = (np.array([masses(opened, e, m, top) for e in held]) for m in ([], [settings[str(best)]]))
    relevant, sink = (interval(focused[:, n] - plain[:, n]) for n in (0, 1))
    turns = relevant.low > 0 and sink.high < 0
    means = table.groupby("setting", sort=False)[["logp", "right"]].mean()
    return Finding(
        measured={
            "logp": means["logp"].to_dict(),
            "accuracy": means["right"].to_dict(),
            "change": change,
            "rise_over_random_direction": beyond,
            "alpha": best,
            "rise_on_calibration_prompts": tried,
            "mass_on_relevant": {"plain": plain[:, 0].mean(), "focused": focused[:, 0].mean(), "change": relevant},
            "mass_on_sink": {"plain": plain[:, 1].mean(), "focused": focused[:, 1].mean(), "change": sink},
            "mean_length": learnt.directions[tuple(zip(*top, strict=True))].norm(dim=-1).mean(),
            "perplexity": {
                "plain": perplexity(opened, haystack(), windows=2),
                "focused": perplexity(opened, haystack(), [settings[str(best)]], windows=2),
            },
            "prompts": len(held),
        },
        expected="With 95% certainty: the mass on the relevant document rises, that on the sink falls, and the "
        "log-probability rises, also above that with random directions.",
        verdict="holds" if turns and change[str(best)].low > 0 and beyond.low > 0 else "fails",
        reason=(
            f"With alpha {best} the top heads' mass on the relevant document changes by {said(relevant)}, on the sink "
            f"by {said(sink)}; the log-probability by {said(change[str(best)])} nats, {said(beyond)} above random "
            "directions."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def focus(opened: Opened, example: tasks.Example) -> steer.Focus:
    """A prompt with its answer. "answer" is the sentence that answers, "relevant" the document it comes from."""
    assert example.gold is not None
    text = example.prompt + example.options[example.gold]
    spans = {"relevant": example.spans[f"document {example.place + 1}"]}
    spans["answer"] = (text.rindex("? ") + 1, len(text))
    ids = opened.encode(text)["input_ids"][0]
    return steer.Focus(ids, Segments.from_characters(text, spans, opened.tokenizer))


def masses(
    opened: Opened, example: tasks.Example, methods: Sequence[steer.Method], heads: Heads
) -> Float[np.ndarray, " two"]:
    """The last token's mean mass, in these heads, on the relevant document and on the first token."""
    gold, segments = f"document {example.place + 1}", example.segments(opened)
    readings = [Mass((gold, "first"), per="head", queries=[-1])]
    with steered(opened, methods, segments), attend(opened, readings, segments=segments) as run, torch.no_grad():
        opened.model(input_ids=opened.encode(example.prompt)["input_ids"])
    mass = run.tree["text"]["mass"].sel(segment=[gold, "first"]).transpose("layer", "head", "segment").values
    return mass[tuple(zip(*heads, strict=True))].mean(0)
