"""Circuits used again: heads that inhibit what they attend to, found on one task, made to inhibit the wrong answers of
another; and what brings the asked object to the last token, cut.

The paper finds its heads by path patching. Here they are found by simpler means, on indirect object identification:
the first-order effect, on the logits' difference of the two names, of a head's last row forced onto one name rather
than the other; the best are then forced in truth, and those of the largest effect kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise import scan, steer
from headwise.attention import Blend, Inputs, Mass, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments, open_model
from headwise.scan.needles import haystack
from headwise.study import tasks
from headwise.study.contextual_heads import over_mean, said
from headwise.study.evaluate import Asked, difference, evaluate, interval, perplexity, steered
from headwise.study.finding import Finding
from headwise.study.induction import same_layers
from headwise.study.registry import study

PAPER = steer.ForceAttention.paper
KEPT = 4
"""Heads whose attention is forced, as many as in the paper."""
COLOURS = ("colour 1", "colour 2", "colour 3")
Heads = list[tuple[int, int]]


@study(
    "forced_attention",
    paper=PAPER,
    room="steer",
    claim="Heads that inhibit a name in one task, made to attend to the wrong answers of another, repair it.",
)
def forced_attention(
    model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), count: int = 12, chosen: int = 16, draws: int = 4
) -> Finding:
    """Coloured objects, the last token's attention in four heads forced onto the two wrong colours. Heads are chosen on
    sentences about a gift; which colours are wrong is told, as in the paper. Controls: as many random heads of the same
    layers, and the same heads forced onto the right colour. Beside it: what the name movers then look at, and the loss
    of a novel's tokens with these heads forced onto two of the tokens before."""
    opened = model if isinstance(model, Opened) else open_model(model)
    heads, effects = inhibition_heads(opened, chosen)
    rest = {f"random {n}": same_layers(opened, heads, heads, n) for n in range(draws)}
    examples = [e for seed in seeds for e in tasks.coloured_objects(seed, count)]
    settings = {"wrong": forced(opened, heads, right=False), "right": forced(opened, heads, right=True)}
    settings |= {name: forced(opened, drawn, right=False) for name, drawn in rest.items()}
    table = evaluate(opened, examples, settings)
    change = {name: difference(table, name, "share") for name in settings}
    beyond = over_mean(table, "wrong", list(rest), "share")
    control = difference(table, "wrong", "share", against="right")
    movers = later_movers(opened, heads)
    shifts = [looks(opened, e, movers, settings["wrong"](e)) - looks(opened, e, movers) for e in examples]
    moved = {what: interval(column) for what, column in zip(("right", "wrong"), np.array(shifts).T, strict=True)}
    means = table.groupby("setting", sort=False)[["share", "right"]].mean()
    holds = change["wrong"].low > 0 and beyond.low > 0 and control.low > 0
    return Finding(
        measured={
            "accuracy": means["right"].to_dict(),
            "share": means["share"].to_dict(),
            "change_of_share": change,
            "change_of_accuracy": difference(table, "wrong", "right"),
            "rise_over_random_heads": beyond,
            "rise_over_right_colour": control,
            "heads": heads,
            "effect_on_names": effects,
            "movers": movers,
            "change_of_movers_mass": moved,
            "perplexity": {"plain": forced_text(opened), "forced": forced_text(opened, heads)},
            "prompts": len(examples),
        },
        expected="The right colour's share of the three rises with 95% certainty, more than with random heads and more "
        "than with the heads forced onto the right colour, each with 95% certainty.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Forced onto the wrong colours, {len(heads)} heads change the right one's share by "
            f"{said(change['wrong'])} from {means['share']['plain']:.2f} (accuracy {means['right']['plain']:.2f} to "
            f"{means['right']['wrong']:.2f}); {said(beyond)} above random heads, {said(control)} above the same heads "
            "forced onto the right colour."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


@study(
    "content_gatherers",
    paper=PAPER,
    room="steer",
    claim="Without the heads that carry the asked object from the question to the last token, the answer is a guess.",
)
def content_gatherers(
    model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), count: int = 24, chosen: int = 8, share: float = 0.1
) -> Finding:
    """Coloured objects, those of the prompts that the model answers right, with the last token's view of the question
    cut in the tenth of the heads that look there most, on other prompts. Controls: as many random other heads, and all
    heads. Beside it the loss of a novel's tokens with these heads' view of 16 of the tokens before cut."""
    opened = model if isinstance(model, Opened) else open_model(model)
    ranked = by_mass(opened, tasks.coloured_objects(100, chosen), "question")
    number = max(1, round(share * len(ranked)))
    top, others = ranked[:number], ranked[number:]
    sets: dict[str, Heads] = {"gatherers": top, "all": ranked}
    sets |= {f"random {n}": random.Random(n).sample(others, number) for n in range(3)}
    settings = {n: [steer.Knockout("question", heads=tuple(heads), queries="last")] for n, heads in sets.items()}
    drawn = [e for seed in seeds for e in tasks.coloured_objects(seed, count)]
    right = evaluate(opened, drawn, {})["right"]
    examples = [e for e, answered in zip(drawn, right, strict=True) if answered]
    if len(examples) < 2:
        raise HeadwiseError(f"content_gatherers: {opened.name} answers {len(examples)} of {len(drawn)} prompts right.")
    table = evaluate(opened, examples, settings)
    drop = difference(table, "gatherers", "right")
    beyond = over_mean(table, "gatherers", [n for n in sets if n.startswith("random")], "right")
    left = interval(table[table["setting"] == "gatherers"]["right"].to_numpy())
    means = table.groupby("setting", sort=False)[["right", "share", "logp"]].mean()
    holds = drop.high < 0 and beyond.high < 0 and left.low <= 1 / 3 <= left.high
    return Finding(
        measured={
            "accuracy": means["right"].to_dict(),
            "share": means["share"].to_dict(),
            "logp": means["logp"].to_dict(),
            "accuracy_left": left,
            "change_of_accuracy": drop,
            "change_over_random_heads": beyond,
            "heads": top,
            "perplexity": {"plain": cut_text(opened)} | {name: cut_text(opened, heads) for name, heads in sets.items()},
            "prompts": len(examples),
            "accuracy_on_all_drawn": right.mean(),
        },
        expected="Accuracy falls, more than with random heads, each with 95% certainty, to an interval that holds 1/3.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Accuracy goes from {means['right']['plain']:.2f} to {left.mean:.2f} ({left.low:.2f} to {left.high:.2f}) "
            f"without {number} of {len(ranked)} heads' view of the question, to "
            f"{means['right'].filter(like='random').mean():.2f} with random ones and {means['right']['all']:.2f} with "
            "all heads cut."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def inhibition_heads(opened: Opened, count: int, screened: int = 12) -> tuple[Heads, list[float]]:
    """The heads of the largest effect when forced onto the giver's second mention rather than onto the receiver, and
    that effect: how much the receiver's logit gains on the giver's."""
    examples = tasks.ioi(100, 2 * count)
    slopes = torch.stack([slope(opened, e) for e in examples[:count]]).mean(0)
    order = slopes.flatten().argsort(descending=True)[:screened].tolist()
    heads = [(n // slopes.shape[1], n % slopes.shape[1]) for n in order]
    measured = {}
    asked = [Asked(opened, e) for e in examples[count:]]
    for head in heads:
        gaps = []
        for one, example in zip(asked, examples[count:], strict=True):
            at = places(opened, example)
            giver, receiver = (
                one.scores([steer.ForceAttention((at[name],), (head,), "last")]) for name in ("again", "receiver")
            )
            gaps.append(float((giver[0] - giver[1]) - (receiver[0] - receiver[1])))
        measured[head] = float(np.mean(gaps))
    kept = sorted(heads, key=lambda h: -measured[h])[:KEPT]
    return kept, [measured[h] for h in kept]


def places(opened: Opened, example: tasks.Example) -> dict[str, int]:
    """The last tokens of the receiver's name and of the giver's second mention."""
    giver = example.options[1].strip()
    start = example.prompt.rindex(giver)
    spans = {"receiver": example.spans["receiver"], "again": (start, start + len(giver))}
    segments = Segments.from_characters(example.prompt, spans, opened.tokenizer)
    return {name: int(segments.mask(name).flatten().nonzero()[-1]) for name in spans}


def slope(opened: Opened, example: tasks.Example) -> Float[Tensor, "layer head"]:
    """First-order effect, on the receiver's logit less the giver's, of a head's last output moving from the receiver's
    value to that of the giver's second mention."""
    at, ids = places(opened, example), opened.encode(example.prompt)["input_ids"]
    options = [opened.encode(example.prompt + option)["input_ids"][0, -1] for option in example.options]
    with attend(opened, [Inputs(("v",), stream="text", name="v")]) as run, torch.no_grad():
        opened.model(input_ids=ids)
    v = torch.tensor(run.tree["text"]["v"].isel(sample=0).transpose("layer", "head", ...).values, device=ids.device)
    alphas = {name: torch.zeros(v.shape[:2], device=ids.device, requires_grad=True) for name in at}
    edits = [
        Blend(alpha[layer], target=v[layer, :, at[name]], layer=layer, tokens="last")
        for name, alpha in alphas.items()
        for layer in range(len(v))
    ]
    with torch.enable_grad(), attend(opened, edits=edits, segments=example.segments(opened)):
        logits = opened.model(input_ids=ids).logits[0, -1]
        again, receiver = torch.autograd.grad(
            logits[options[0]] - logits[options[1]], [alphas["again"], alphas["receiver"]]
        )
    return again - receiver


def forced(opened: Opened, heads: Heads, right: bool) -> Any:
    """The heads' last row on the right colour's token, or on the two wrong ones'."""

    def methods(example: tasks.Example) -> list[steer.Method]:
        segments = example.segments(opened)
        at = [segments.mask(name).flatten().nonzero().flatten().tolist() for name in COLOURS]
        if any(len(where) != 1 for where in at):
            raise HeadwiseError(f"forced_attention: {opened.name} writes a colour in several tokens.")
        chosen = tuple(where[0] for n, where in enumerate(at) if (n == example.gold) is right)
        return [steer.ForceAttention(chosen, tuple(heads), "last")]

    return methods


def later_movers(opened: Opened, heads: Heads, count: int = 5) -> Heads:
    """The strongest name movers in layers behind the first of these heads, none of them one of these."""
    table = scan.heads(opened, questions=[scan.NameMovers()]).heads.sort_values("name_movers", ascending=False)
    ranked = [(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]
    first = min(layer for layer, _ in heads)
    return [pair for pair in ranked if pair[0] > first and pair not in heads][:count]


def looks(
    opened: Opened, example: tasks.Example, heads: Heads, methods: Sequence[steer.Method] = ()
) -> Float[np.ndarray, " two"]:
    """The last token's mean mass, in these heads, on the right colour and on the wrong ones together."""
    mass = last_mass(opened, example, COLOURS, methods)[tuple(zip(*heads, strict=True))].mean(0)
    return np.array([mass[example.gold], mass.sum() - mass[example.gold]])


def last_mass(
    opened: Opened, example: tasks.Example, names: Sequence[str], methods: Sequence[steer.Method] = ()
) -> Float[np.ndarray, "layer head segment"]:
    """What the last token gives to these segments."""
    segments, readings = example.segments(opened), [Mass(names, per="head", queries=[-1], stream="text")]
    with steered(opened, methods, segments), attend(opened, readings, segments=segments) as run, torch.no_grad():
        opened.model(input_ids=opened.encode(example.prompt)["input_ids"])
    return run.tree["text"]["mass"].sel(segment=list(names)).transpose("layer", "head", "segment").values


def by_mass(opened: Opened, examples: Sequence[tasks.Example], name: str) -> Heads:
    """All heads, the one whose last token gives most to this segment first."""
    mass = np.mean([last_mass(opened, e, [name])[..., 0] for e in examples], 0)
    order = np.argsort(-mass, axis=None, kind="stable")
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, mass.shape), strict=True)]


def forced_text(opened: Opened, heads: Heads | None = None) -> float:
    """Perplexity of 32 tokens of a novel, read with these heads forced onto two of the 128 tokens before."""
    segments = Segments.from_spans({"tail": (127, 160)}, 160)
    methods = [] if heads is None else [steer.ForceAttention((40, 90), tuple(heads), "tail")]
    return perplexity(opened, haystack(), methods, 160, windows=6, segments=segments, start=128)


def cut_text(opened: Opened, heads: Heads | None = None) -> float:
    """Perplexity of 32 tokens of a novel, read without these heads' view of 16 of the 128 tokens before."""
    segments = Segments.from_spans({"cut": (56, 72), "tail": (127, 160)}, 160)
    methods = [] if heads is None else [steer.Knockout("cut", heads=tuple(heads), queries="tail")]
    return perplexity(opened, haystack(), methods, 160, windows=6, segments=segments, start=128)
