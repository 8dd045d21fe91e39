"""Retrieval heads: are they few, do they cause the answer, and are they the same ones for other facts?"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from headwise import scan
from headwise.attention import Blend
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.needles import answer, prefill
from headwise.study.finding import Finding
from headwise.study.registry import study

PAPER = Paper("Retrieval Head Mechanistically Explains Long-Context Factuality", "2404.15574")
FIRST, SECOND = scan.NEEDLES[:3], scan.NEEDLES[3:]
CONTEXTS = (256, 512, 1024)
Heads = list[tuple[int, int]]


@study(
    "retrieval_sparse",
    paper=PAPER,
    room="scan",
    claim="Fewer than 5% of a language model's heads are retrieval heads (score of at least 0.1).",
)
def retrieval_sparse(model: Any = "zoo:llm", question: scan.RetrievalHeads | None = None) -> Finding:
    opened = model if isinstance(model, Opened) else open_model(model)
    asked = question or scan.RetrievalHeads(contexts=CONTEXTS)
    table = scored(opened, asked, FIRST)
    share = float((table["retrieval_heads"] >= asked.threshold).mean())
    top = table.nlargest(5, "retrieval_heads")
    return Finding(
        measured={
            "share": share,
            "heads": int((table["retrieval_heads"] >= asked.threshold).sum()),
            "ever_active": float((table["retrieval_active"] > 0).mean()),
            "top": [[int(r.layer), int(r.head), round(float(r.retrieval_heads), 3)] for r in top.itertuples()],
            "contexts": list(asked.contexts),
        },
        expected="Less than 5% of heads with a score of at least 0.1.",
        verdict="holds" if share < 0.05 else "fails",
        reason=f"{share:.1%} of {len(table)} heads score at least 0.1 (answer span, each of its tokens counted once).",
        model=opened.name,
    )


@study(
    "retrieval_causal",
    paper=PAPER,
    room="scan",
    claim="Without its retrieval heads a model loses facts from its context; without random ones it keeps them.",
)
def retrieval_causal(
    model: Any = "zoo:llm", question: scan.RetrievalHeads | None = None, count: int = 10, draws: int = 5, seed: int = 0
) -> Finding:
    """Heads are scored on three invented facts and knocked out on three others: attention made uniform while decoding,
    the reading of the context untouched. Random heads are drawn outside of the 100 highest (or the upper half of a
    small model)."""
    opened = model if isinstance(model, Opened) else open_model(model)
    asked = question or scan.RetrievalHeads()
    table = scored(opened, asked, FIRST)
    ranked = table.sort_values("retrieval_heads", ascending=False, kind="stable")
    order = _pairs(ranked)
    rest = order[min(100, len(order) // 2) :]
    draw = random.Random(seed)
    sets = {"none": [], "top": order[:count]} | {f"random_{n}": draw.sample(rest, count) for n in range(draws)}
    found = recalls(opened, replace(asked, needles=SECOND, depths=3), sets)
    others = [found[f"random_{n}"] for n in range(draws)]
    lost, lost_random = found["none"] - found["top"], found["none"] - sum(others) / draws
    holds = lost >= 0.3 and lost >= 3 * max(lost_random, 0) and found["top"] < min(others)
    return Finding(
        measured=found | {"lost_top": lost, "lost_random": lost_random, "heads": order[:count], "knock_out": "uniform"},
        expected=f"Without the top {count} recall falls by at least 0.3 and 3 times as far as without random ones.",
        verdict="holds" if holds else "fails",
        reason=(
            f"On held-out facts recall is {found['none']:.2f}, without the top {count} heads {found['top']:.2f}, "
            f"without {count} random heads {sum(others) / draws:.2f} (mean of {draws} draws)."
        ),
        model=opened.name,
        seeds=[seed],
    )


@study(
    "retrieval_stable",
    paper=PAPER,
    room="scan",
    claim="Retrieval heads belong to the model: other facts find the same heads.",
)
def retrieval_stable(model: Any = "zoo:llm", question: scan.RetrievalHeads | None = None) -> Finding:
    """Rank correlation of the heads' scores between two disjoint sets of three invented facts."""
    opened = model if isinstance(model, Opened) else open_model(model)
    asked = question or scan.RetrievalHeads()
    one, two = (scored(opened, asked, needles)["retrieval_heads"] for needles in (FIRST, SECOND))
    rank = spearman(one, two)
    some = (one > 0) | (two > 0)
    first, second = set(one.nlargest(10).index), set(two.nlargest(10).index)
    return Finding(
        measured={
            "spearman": rank,
            "spearman_active": spearman(one[some], two[some]),
            "active_heads": int(some.sum()),
            "pearson": float(one.corr(two)),
            "shared_top10": len(first & second),
        },
        expected="Spearman correlation of all heads' scores above 0.6.",
        verdict="holds" if rank > 0.6 else "fails",
        reason=f"Spearman correlation {rank:.2f} over all heads; {len(first & second)} of the top 10 are the same.",
        model=opened.name,
    )


@study(
    "retrieval_contexts",
    paper=PAPER,
    room="scan",
    claim="The same heads retrieve, however long the context is.",
)
def retrieval_contexts(
    model: Any = "zoo:llm", question: scan.RetrievalHeads | None = None, draws: int = 50, seed: int = 0
) -> Finding:
    """Rank correlation of all heads' scores between every two contexts; against heads shuffled within their layers, of
    which only the depth in the model is left."""
    opened = model if isinstance(model, Opened) else open_model(model)
    asked = question or scan.RetrievalHeads(contexts=CONTEXTS)
    data = scanned(opened, asked, FIRST).data.sel(stream="text")
    scores = {int(c): data["retrieval_map"].sel(context=c).mean("depth").values for c in data["context"].values}
    rows = []
    rng = np.random.default_rng(seed)
    for one, two in combinations(scores, 2):
        ranks = float(data["retrieval_stability"].sel(context=one, context_other=two))
        shuffled = [rank_correlation(scores[one], rng.permuted(scores[two], axis=1)) for _ in range(draws)]
        rows.append({"contexts": [one, two], "spearman": ranks, "shuffled": np.mean(shuffled)})
    lowest = min(rows, key=lambda row: row["spearman"])
    holds = all(row["spearman"] > 0.6 and row["spearman"] > row["shuffled"] for row in rows)
    recall = data["retrieval_recall"].mean("depth")
    return Finding(
        measured={"pairs": rows, "recall": dict(zip(scores, recall.values, strict=True))},
        expected="Spearman above 0.6 for every two contexts, and above that of heads shuffled within their layers.",
        verdict="holds" if holds else "fails",
        reason=(
            f"The lowest Spearman correlation is {lowest['spearman']:.2f} (contexts of {lowest['contexts'][0]} and "
            f"{lowest['contexts'][1]} tokens); {lowest['shuffled']:.2f} with heads shuffled within layers."
        ),
        model=opened.name,
        seeds=[seed],
    )


def scanned(opened: Opened, question: scan.RetrievalHeads, needles: tuple[scan.Needle, ...]) -> scan.Scan:
    """The scan for these facts; studies run one after the other share it."""
    asked = replace(question, needles=needles)
    key = (opened.fingerprint, asked)
    if key not in _SCANNED:
        _SCANNED[key] = scan.heads(opened, questions=[asked])
    return _SCANNED[key]


_SCANNED: dict[tuple[str, scan.RetrievalHeads], scan.Scan] = {}


def scored(opened: Opened, question: scan.RetrievalHeads, needles: tuple[scan.Needle, ...]) -> pd.DataFrame:
    """The table of heads of that scan."""
    return scanned(opened, question, needles).heads


def recalls(opened: Opened, question: scan.RetrievalHeads, sets: dict[str, Heads]) -> dict[str, float]:
    """Mean ROUGE-1 recall of the answers with each set of heads knocked out while decoding; one prefill serves all."""
    found: dict[str, list[float]] = {name: [] for name in sets}
    for hidden in question.instances(opened):
        state = prefill(opened, hidden)
        for name, heads in sets.items():
            edits = [Blend(alpha=1.0, target="uniform", heads=heads)] if heads else []
            found[name].append(answer(opened, hidden, copy.deepcopy(state), question.max_new, edits)[0])
    return {name: sum(values) / len(values) for name, values in found.items()}


def _pairs(table: pd.DataFrame) -> Heads:
    return [(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]


def rank_correlation(one: np.ndarray, two: np.ndarray) -> float:
    return spearman(pd.Series(one.ravel()), pd.Series(two.ravel()))


def spearman(one: pd.Series, two: pd.Series) -> float:
    """Rank correlation; ties share their mean rank."""
    return float(one.rank().corr(two.rank()))
