"""Do heads keep to patterns a person can name, and does a model gain when such heads are held to them?

The paper trains its models after the patterns went in; here nothing is trained, which is the question a user of a
running model has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention import At, Mass, attend
from headwise.models import Opened, Segments, open_model
from headwise.scan.needles import haystack
from headwise.steer import MatchingTokens, Method, PatternMask, apply
from headwise.study.evaluate import interval
from headwise.study.finding import Finding
from headwise.study.registry import study

RELATIVE = {"previous token": "previous", "next token": "next", "same sentence": "same"}
SENTENCES = 2
"""In each half of a passage."""


@dataclass(frozen=True, eq=False)
class Text:
    """Model inputs, their sentences as segments, and for every token the other places of the same one (-1: none)."""

    batch: dict[str, Tensor]
    segments: Segments
    matches: Int[Tensor, "token match"]
    special: tuple[int, ...]

    @classmethod
    def of(cls, opened: Opened, text: str) -> Text:
        ends = [m.end() for m in re.finditer(r"[.!?]+[\"']?\s+", text)]
        cuts = sorted({0, *ends, len(text)})
        spans = {f"sentence {n + 1}": cut for n, cut in enumerate(pairwise(cuts))}
        batch = opened.encode(text)
        ids = batch["input_ids"][0]
        special = tuple(int(i) for i in opened.tokenizer.all_special_ids)
        same = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
        same &= ~torch.isin(ids, torch.tensor(special, device=ids.device))
        width = max(1, int(same.sum(1).max()))
        places = same.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        matches = torch.where(same.gather(1, places), places, -1)
        return cls(batch, Segments.from_characters(text, spans, opened.tokenizer), matches.cpu(), special)


def relevance(opened: Opened, text: Text) -> xr.DataArray:
    """GR: the share of its attention that a head gives to the keys of a pattern, mean over queries: [pattern, layer,
    head]."""
    readings = [Mass(tuple(RELATIVE.values())), At(targets=text.matches)]
    with attend(opened, readings, segments=text.segments) as run, torch.no_grad():
        opened.model(**text.batch)
    node = run.tree[opened.streams[0]].isel(sample=0)
    relative = node["mass"].mean("query").rename(segment="pattern").assign_coords(pattern=list(RELATIVE))
    matching = node["at"].sum("target").mean("query").expand_dims(pattern=["matching token"])
    return xr.concat([relative, matching], "pattern").transpose("pattern", "layer", "head")


def injected(heads: Mapping[str, Sequence[tuple[int, int]]], text: Text) -> list[Method]:
    """The paper's ways: places are fixed, same tokens and same sentences are masks."""
    methods: list[Method] = []
    for name, some in heads.items():
        if name == "matching token":
            methods.append(PatternMask(MatchingTokens(text.batch["input_ids"], text.special), heads=some))
        else:
            mode = "mask" if name == "same sentence" else "fix"
            methods.append(PatternMask(RELATIVE[name], heads=some, mode=mode))
    return methods


def followers(gr: xr.DataArray, count: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """For every pattern the `count` heads of the highest GR, no head for two patterns."""
    found: dict[str, list[tuple[int, int]]] = {str(name): [] for name in gr["pattern"].values}
    taken: set[tuple[int, int]] = set()
    share = (gr / gr.mean(("layer", "head"))).stack(place=("pattern", "layer", "head"))
    for name, layer, head in share.sortby(-share)["place"].values:
        if len(found[name]) < count and (layer, head) not in taken:
            found[name].append((int(layer), int(head)))
            taken.add((layer, head))
    return {name: tuple(heads) for name, heads in found.items()}


def drawn(gr: xr.DataArray, count: int, seed: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """As many heads for every pattern, at random."""
    every = [(int(a), int(h)) for a in gr["layer"].values for h in gr["head"].values]
    order = iter(np.random.default_rng(seed).permutation(len(every)))
    return {str(name): tuple(every[next(order)] for _ in range(count)) for name in gr["pattern"].values}


def passages(count: int, sentences: int, start: int = 0) -> list[str]:
    """Runs of sentences of a novel, as many again left out between two of them."""
    every = re.split(r"(?<=[.!?])\s+", haystack())
    places = range(start, len(every), 2 * sentences)
    return [" ".join(every[at : at + sentences]) for at in list(places)[:count]]


@study(
    "pattern_relevance",
    paper=PatternMask.paper,
    room="steer",
    claim="Some heads of an encoder give far more attention than the mean head to a pattern a person can name.",
)
def pattern_relevance(model: Any = "zoo:encoder", texts: int = 24, sentences: int = 6) -> Finding:
    """GR of four patterns on passages of a novel; each pattern's best head is chosen on one half and judged on the
    other."""
    opened = model if isinstance(model, Opened) else open_model(model)
    gr = xr.concat([relevance(opened, Text.of(opened, text)) for text in passages(texts, sentences)], "text")
    first, second = gr.isel(text=slice(0, texts // 2)).mean("text"), gr.isel(text=slice(texts // 2, None))
    rows = []
    for name, [(layer, head)] in followers(first, 1).items():
        mine = second.sel(pattern=name)
        best, mean = mine.sel(layer=layer, head=head), mine.mean(("layer", "head"))
        change = interval((best - mean).values)
        rows.append(
            {"pattern": name, "layer": layer, "head": head, "best": float(best.mean()), "mean": float(mean.mean())}
            | {"low": change.low, "high": change.high}
        )
    missed = [r["pattern"] for r in rows if r["low"] <= 0 or r["best"] < 3 * r["mean"]]
    said = [f"{r['pattern']} {r['best']:.2f} against {r['mean']:.2f}" for r in rows]
    return Finding(
        measured={"patterns": rows, "texts": texts},
        expected=(
            "For each of the four patterns the head chosen on other texts gives it at least three times the mean "
            "head's share (95% interval of the difference above 0)."
        ),
        verdict="fails" if missed else "holds",
        reason=(
            f"Share of attention on the pattern, best head against the mean head: {', '.join(said)}. "
            f"Less than three times the mean: {', '.join(missed) or 'none'}."
        ),
        model=opened.name,
    )


@study(
    "pattern_injection",
    paper=PatternMask.paper,
    room="steer",
    claim="A model is better when heads are held to the patterns that heads were seen to follow.",
)
def pattern_injection(
    model: Any = "zoo:encoder",
    texts: int = 48,
    calibration: int = 12,
    heads: int = 3,
    draws: Sequence[int] = (0, 1, 2),
) -> Finding:
    """Without training: the four patterns go into the `heads` heads that follow each most (seen on other texts). The
    task: find the second half of a passage by the first among those of all passages, by the cosine of mean token
    vectors; measured is the reciprocal rank. Control: as many heads drawn at random. An encoder writes no text, so it
    has no perplexity: the side effect shown is how far the injection moves a text's unit vector."""
    opened = model if isinstance(model, Opened) else open_model(model)
    whole = passages(calibration + texts, 2 * SENTENCES)
    gr = xr.concat([relevance(opened, Text.of(opened, t)) for t in whole[:calibration]], "text").mean("text")
    halves = [re.split(r"(?<=[.!?])\s+", text) for text in whole[calibration:]]
    sides = [[Text.of(opened, " ".join(h)) for h in side] for side in zip(*map(cut, halves), strict=True)]
    settings = {"followers": followers(gr, heads)} | {f"drawn {n}": drawn(gr, heads, n) for n in draws}
    found = {"plain": vectors(opened, sides, lambda text: [])}
    for name, chosen in settings.items():
        found[name] = vectors(opened, sides, lambda text, chosen=chosen: injected(chosen, text))
    rank = {name: reciprocal_ranks(*both) for name, both in found.items()}
    moved = {name: (both - found["plain"]).norm(dim=-1).flatten().cpu().numpy() for name, both in found.items()}
    change = {name: interval(x - rank["plain"])._asdict() for name, x in rank.items() if name != "plain"}
    others = np.mean([change[f"drawn {n}"]["mean"] for n in draws])
    mine = change["followers"]
    return Finding(
        measured={
            "reciprocal_rank": {name: float(x.mean()) for name, x in rank.items()},
            "change": change,
            "moved": {name: interval(x)._asdict() for name, x in moved.items() if name != "plain"},
            "heads": settings["followers"],
            "passages": texts,
        },
        expected="The mean reciprocal rank rises (95% interval above 0) with patterns in the heads that follow them.",
        verdict="holds" if mine["low"] > 0 else "fails",
        reason=(
            f"Mean reciprocal rank {rank['plain'].mean():.3f}; with {heads} heads a pattern it changes by "
            f"{mine['mean']:+.3f} ({mine['low']:+.3f} to {mine['high']:+.3f}) in heads that follow the pattern and by "
            f"{others:+.3f} in heads drawn. The paper trains the model afterwards, which was not done here."
        ),
        model=opened.name,
        seeds=list(draws),
    )


def cut(sentences: list[str]) -> tuple[list[str], list[str]]:
    return sentences[: len(sentences) // 2], sentences[len(sentences) // 2 :]


def vectors(
    opened: Opened, sides: Sequence[Sequence[Text]], methods: Callable[[Text], Sequence[Method]]
) -> Float[Tensor, "side passage dim"]:
    return torch.stack([torch.stack([vector(opened, text, methods(text)) for text in side]) for side in sides])


def reciprocal_ranks(
    first: Float[Tensor, "passage dim"], second: Float[Tensor, "passage dim"]
) -> Float[np.ndarray, " passage"]:
    """1 / the place of a passage's own second half among all, by similarity to its first half."""
    alike = first @ second.T
    return (1 / (alike >= alike.diagonal()[:, None]).sum(1)).cpu().numpy()


@torch.no_grad()
def vector(opened: Opened, text: Text, methods: Sequence[Method]) -> Float[Tensor, " dim"]:
    """A text's unit vector: the mean of its tokens' last hidden states."""
    if methods:
        with apply(opened, *methods, segments=text.segments):
            states = opened.model(**text.batch).last_hidden_state
    else:
        states = opened.model(**text.batch).last_hidden_state
    return torch.nn.functional.normalize(states[0].float().mean(0), dim=-1)
