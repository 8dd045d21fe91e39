"""Documents put where the model looks most: are they answered from more easily than in other orders?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float

from headwise import steer
from headwise.attention import Mass, attend
from headwise.models import Opened, Segments, open_model
from headwise.scan.basin import basin_layer, edge_ratio
from headwise.scan.needles import haystack
from headwise.steer.attn_rank import PAPER
from headwise.study import tasks
from headwise.study.evaluate import PLAIN, difference, evaluate, perplexity
from headwise.study.finding import Finding
from headwise.study.registry import study

ITEMS = 8
NAMES = tuple(f"document {n + 1}" for n in range(ITEMS))
FIXED = ("descending", "ascending", "both ends")
"""Orders that know nothing of the model: the most relevant first, last, and in turn at the two ends."""
RIGHT = "attn_rank, right relevance"


@study(
    "attn_rank",
    paper=PAPER,
    room="steer",
    claim="Documents ordered so that the most relevant stand where the model looks most are answered from more easily.",
)
def attn_rank(
    model: Any = "zoo:llm",
    encoder: Any = "zoo:encoder",
    seeds: Sequence[int] = (0, 1, 2),
    count: int = 8,
    calibration: int = 16,
) -> Finding:
    """Log-probability of the right answer by the order of 8 documents. The profile is that of the shallowest layer with
    a basin in the first third of the layers (else of the largest edge ratio), on other prompts; relevance is the cosine
    of an encoder's mean vectors. Random order, with the gold document at every place as often, is the placebo: the same
    method with a profile that means nothing. Beside it: random order with the profile flattened inside the model, and
    what that does to ordinary text. An order leaves the model as it is, and so its perplexity."""
    opened = model if isinstance(model, Opened) else open_model(model)
    judge = encoder if isinstance(encoder, Opened) else open_model(encoder)
    profiles = place_profiles(opened, tasks.documents(100, calibration, ITEMS))
    shallow = profiles.isel(layer=slice(-(-profiles.sizes["layer"] // 3)))
    basin = basin_layer(shallow)
    layer = int(edge_ratio(shallow).argmax("layer")) if basin is None else basin
    places = profiles.sel(layer=layer).values
    flatten = steer.FlattenBasin(NAMES, tuple(places.tolist()))
    examples = [e for seed in seeds for e in tasks.documents(seed, count, ITEMS)]
    relevance = [cosines(judge, e) for e in examples]
    told = [r + 10 * np.eye(ITEMS)[e.place] for r, e in zip(relevance, examples, strict=True)]
    given = dict.fromkeys((*FIXED, "attn_rank"), relevance) | {RIGHT: told}
    tables = [evaluate(opened, examples, {"flattened": [flatten]}).replace({"setting": {PLAIN: "random"}})]
    for name, scores in given.items():
        ordered = [reorder(e, order(name, r, places)) for e, r in zip(examples, scores, strict=True)]
        tables.append(evaluate(opened, ordered, {}).assign(setting=name))
    table = pd.concat(tables)
    over = {name: difference(table, "attn_rank", against=name) for name in ("random", *FIXED)}
    better = [name for name in FIXED if over[name].high < 0]
    means = table.groupby("setting", sort=False)[["logp", "right"]].mean()
    return Finding(
        measured={
            "logp": means["logp"].to_dict(),
            "accuracy": means["right"].to_dict(),
            "rise_over": over,
            "rise_with_right_relevance": difference(table, RIGHT, against="random"),
            "rise_flattened": difference(table, "flattened", against="random"),
            "layer": layer,
            "has_a_basin": basin is not None,
            "profile": places,
            "gold_most_relevant": np.mean([r.argmax() == e.place for r, e in zip(relevance, examples, strict=True)]),
            "perplexity": {"plain": after_items(opened), "flattened": after_items(opened, flatten)},
            "prompts": len(examples),
        },
        expected="Above random order with 95% certainty, and no fixed order above it with 95% certainty.",
        verdict="holds" if over["random"].low > 0 and not better else "fails",
        reason=(
            f"The order by layer {layer} (most attention to place {int(places.argmax()) + 1} of {ITEMS}) changes the "
            f"log-probability by {over['random'].mean:+.2f} nats against random order ({over['random'].low:+.2f} to "
            f"{over['random'].high:+.2f}); "
            + (f"better than it: {', '.join(better)}." if better else "no fixed order is better with certainty.")
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def place_profiles(opened: Opened, examples: Sequence[tasks.Example]) -> xr.DataArray:
    """Mean attention per token of the question's tokens to each place: [layer, slot]."""
    found = []
    for example in examples:
        segments = example.segments(opened)
        asking = (segments.mask("question") | segments.mask("last")).nonzero()[:, -1].tolist()
        with attend(opened, [Mass(NAMES, per="head", queries=asking)], segments=segments) as run, torch.no_grad():
            opened.model(**opened.encode(example.prompt))
        mass = run.tree["text"]["mass"].mean("head").sel(segment=list(NAMES)).transpose("layer", "segment").values
        found.append(mass / np.array([int(segments.mask(name).sum()) for name in NAMES]))
    return xr.DataArray(np.mean(found, 0), dims=("layer", "slot"), coords={"layer": range(len(found[0]))})


def order(name: str, relevance: Float[np.ndarray, " item"], profile: Float[np.ndarray, " item"]) -> list[int]:
    """The items in the order they stand in the prompt."""
    best = np.argsort(-relevance, kind="stable").tolist()
    if name == "descending":
        return best
    if name == "ascending":
        return best[::-1]
    if name == "both ends":
        return best[::2] + best[1::2][::-1]
    return steer.attn_rank(profile.tolist(), relevance.tolist())


def reorder(example: tasks.Example, items: Sequence[int]) -> tasks.Example:
    """The same prompt with its documents in this order."""
    texts = [example.prompt[slice(*example.spans[name])] for name in NAMES]
    start, stop = example.spans[NAMES[0]][0], example.spans[NAMES[-1]][1]
    ordered = [texts[n] for n in items]
    prompt = example.prompt[:start] + "\n\n".join(ordered) + example.prompt[stop:]
    spans, at = dict(example.spans), start
    for name, text in zip(NAMES, ordered, strict=True):
        spans[name] = (at, at + len(text))
        at += len(text) + 2
    return replace(example, prompt=prompt, spans=spans, place=list(items).index(example.place))


def cosines(judge: Opened, example: tasks.Example) -> Float[np.ndarray, " item"]:
    """Cosine of the question's and each document's mean vector."""
    texts = [example.prompt[slice(*example.spans[name])] for name in ("question", *NAMES)]
    vectors = []
    for text in texts:
        with torch.no_grad():
            vectors.append(judge.model(**judge.encode(text)).last_hidden_state[0].mean(0))
    question, *documents = vectors
    return torch.cosine_similarity(torch.stack(documents), question, dim=-1).double().cpu().numpy()


def after_items(opened: Opened, method: steer.Method | None = None, each: int = 16) -> float:
    """Perplexity of 32 tokens of a novel, behind 8 pieces of it that are taken for the items."""
    stop = each * ITEMS
    segments = Segments.from_spans({name: (n * each, (n + 1) * each) for n, name in enumerate(NAMES)}, stop + 32)
    methods = [] if method is None else [method]
    return perplexity(opened, haystack(), methods, stop + 32, windows=6, segments=segments, start=stop)
