"""What does an encoder look at? Behaviours of heads, heads for grammatical relations, and probes on all heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from headwise import scan
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.grammar import Sentence, sentences
from headwise.scan.needles import haystack
from headwise.scan.probing import MODES
from headwise.scan.relations import OFFSETS, RELATIONS
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.untrained import untrained

PAPER = Paper("What Does BERT Look At? An Analysis of BERT's Attention", "1906.04341")


def passages(count: int, words: int) -> list[str]:
    """Pieces of the English prose, one after the other."""
    text = haystack().split()
    count = min(count, len(text) // words)
    return [" ".join(text[n * words : (n + 1) * words]) for n in range(count)]


@study(
    "bert_heads_by_layer",
    paper=PAPER,
    room="scan",
    claim="An encoder has heads for the next and previous token, for separators, and broad ones; heads of one layer "
    "are more alike than heads of different layers.",
)
def bert_heads_by_layer(model: Any = "zoo:encoder", texts: int = 12, words: int = 95, draws: int = 1000) -> Finding:
    """The paper's marks: above 0.5 to the next or previous token, above 0.6 to [CLS], [SEP] or full stops and commas,
    an entropy above 0.78 of the largest. Layers keep together if a random share-out of heads over layers gives as large
    a difference of distances in less than 5% of the draws. Beside it the same for an untrained model."""
    opened = model if isinstance(model, Opened) else open_model(model)
    inputs = passages(texts, words)
    table = scan.behaviours(opened, inputs)
    counts = table["label"].value_counts().to_dict()
    distance = scan.head_distance(opened, inputs)
    trained = scan.layer_contrast(distance, draws)
    fresh = scan.layer_contrast(scan.head_distance(untrained(opened), inputs), draws)
    kinds = {
        "next": counts.get("next", 0),
        "previous": counts.get("previous", 0),
        "separators": sum(counts.get(k, 0) for k in ("cls", "sep", "punctuation")),
        "broad": counts.get("broad", 0),
    }
    missing = [name for name, count in kinds.items() if not count]
    return Finding(
        measured={
            "heads": kinds,
            "highest": {
                name: float(table[name].max())
                for name in ("next", "previous", "cls", "sep", "punctuation")
                if name in table
            },
            "layers": trained,
            "layers_untrained": fresh,
            "stress": scan.head_map(distance).attrs["stress"],
        },
        expected="At least one head of each kind, and p below 0.05.",
        verdict="holds" if not missing and trained["p"] < 0.05 else "fails",
        reason=(
            f"Of {len(table)} heads {kinds['next']} look at the next token, {kinds['previous']} at the previous, "
            f"{kinds['separators']} at separators, {kinds['broad']} broadly; distance within layers "
            f"{trained['within']:.3f}, between {trained['between']:.3f} nats (p = {trained['p']:.3f})."
        ),
        model=opened.name,
    )


@study(
    "relation_heads",
    paper=PAPER,
    room="scan",
    claim="For grammatical relations there is one head that finds them better than any fixed offset.",
)
def relation_heads(
    models: Sequence[Any] = ("zoo:encoder", "zoo:llm"), seeds: Sequence[int] = (0, 1, 2), count: int = 128
) -> Finding:
    """Head, direction and offset are chosen on `count` sentences of a small English grammar and scored on as many
    others, for the relations whose distance varies there. An untrained model of the same shape (first seed) shows what
    choosing among so many heads gives by itself."""
    measured: dict[str, Any] = {}
    behind = []
    for model in models:
        opened = model if isinstance(model, Opened) else open_model(model)
        tables = [table(opened, seed, count) for seed in seeds]
        mean = pd.concat(tables).groupby("relation", sort=False)[["accuracy", "all_heads", "baseline"]].mean()
        fresh = table(untrained(opened), seeds[0], count).set_index("relation")
        first = tables[0].set_index("relation")
        measured[opened.name] = {
            relation: {
                "head": [int(first["layer"][relation]), int(first["head"][relation])],
                "direction": first["direction"][relation],
                "accuracy": row["accuracy"],
                "offset": row["baseline"],
                "mean_of_heads": row["all_heads"],
                "untrained": fresh["accuracy"][relation],
            }
            for relation, row in mean.iterrows()
        }
        behind += [f"{opened.name} {r}" for r, row in mean.iterrows() if row["accuracy"] <= row["baseline"]]
    total = len(RELATIONS) * len(measured)
    found = [row for rows in measured.values() for row in rows.values()]
    accuracy, offset, fresh_accuracy = (np.mean([r[k] for r in found]) for k in ("accuracy", "offset", "untrained"))
    return Finding(
        measured=measured,
        expected="On held-out sentences the chosen head beats the chosen offset for every relation in every model.",
        verdict="fails" if behind else "holds",
        reason=(
            f"The head beats the offset in {total - len(behind)} of {total} cases ({accuracy:.0%} against {offset:.0%} "
            f"of arcs on average; the best heads of untrained models {fresh_accuracy:.0%})"
            + (f"; not for {', '.join(behind)}." if behind else ".")
        ),
        model=", ".join(measured),
        seeds=list(seeds),
    )


def table(opened: Opened, seed: int, count: int) -> pd.DataFrame:
    made = sentences(2 * count, seed=1000 + seed)
    return scan.relation_heads(opened, made[:count], made[count:])


@study(
    "attention_probe_ladder",
    paper=PAPER,
    room="scan",
    claim="A probe on all attention maps finds head words better than an offset, and better still with word vectors.",
)
def attention_probe_ladder(
    model: Any = "zoo:encoder", seeds: Sequence[int] = (0, 1, 2), train: int = 200, test: int = 100, steps: int = 200
) -> Finding:
    """Unlabelled attachment on held-out sentences of the grammar. Beside the claim: the probe on words and distances
    without attention, and the attention probe on the maps of an untrained model."""
    opened = model if isinstance(model, Opened) else open_model(model)
    rows = []
    for seed in seeds:
        made = sentences(train + test, seed=2000 + seed)
        learn, held = (scan.word_maps(opened, part) for part in (made[:train], made[train:]))
        row = {mode: scan.attachment(scan.train_probe(learn, mode, steps, seed), held) for mode in MODES}
        fresh = untrained(opened, seed)
        maps = [scan.word_maps(fresh, part) for part in (made[:train], made[train:])]
        row["attention, untrained"] = scan.attachment(scan.train_probe(maps[0], "attention", steps, seed), maps[1])
        rows.append(row | {"offset": best_offset(made[:train], made[train:])})
    mean = pd.DataFrame(rows).mean().to_dict()
    holds = all(r["attention+words"] > r["attention"] > r["offset"] for r in rows)
    return Finding(
        measured=mean | {"seeds": rows},
        expected="On every seed: attention and words above attention alone above the best offset.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Attachment {mean['attention+words']:.1%} with words, {mean['attention']:.1%} from attention alone, "
            f"{mean['offset']:.1%} by the best offset; words and distances without attention reach "
            f"{mean['words+distance']:.1%} in this small grammar, and untrained attention "
            f"{mean['attention, untrained']:.1%}."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def best_offset(train: Sequence[Sentence], test: Sequence[Sentence]) -> float:
    """Share of arcs of the one offset that is best in training (1, right-branching, in English)."""
    steps = [np.array([arc.head - arc.dependent for s in part for arc in s.arcs]) for part in (train, test)]
    best = max(OFFSETS, key=lambda offset: (steps[0] == offset).mean())
    return float((steps[1] == best).mean())
