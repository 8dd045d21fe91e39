"""Are induction heads what lets a language model repeat a sequence it has seen once?"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from headwise import scan
from headwise.attention import HeadGain, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.induction import repeated
from headwise.study.finding import Finding
from headwise.study.registry import study

Heads = list[tuple[int, int]]


@study(
    "induction_ablation",
    paper=Paper("In-context Learning and Induction Heads", "2209.11895"),
    room="scan",
    claim="Silencing the induction heads destroys the prediction of repeated tokens; as many random heads don't.",
)
def induction_ablation(model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), sequences: int = 4) -> Finding:
    """Heads are scored on one set of sequences and silenced (output times 0) on others. Silenced: all heads with a
    prefix matching of at least 0.4, and for comparison the top five; against as many random other heads of the same
    layers."""
    opened = model if isinstance(model, Opened) else open_model(model)
    rows = []
    for seed in seeds:
        scored = scan.heads(opened, questions=[scan.InductionHeads(seeds=2, first_seed=1000 + 10 * seed)])
        threshold = scan.InductionHeads().threshold
        table = scored.heads.sort_values("induction_heads", ascending=False)
        found = _pairs(table[table["induction_heads"] >= threshold])
        if not found:
            raise HeadwiseError(f"{opened.name} has no head with a prefix matching of {threshold}: nothing to silence.")
        question = scan.InductionHeads(sequences=sequences)
        ids = repeated(opened, question, 5000 + seed).to(opened.device)
        clean = repeated_loss(opened, ids, question)
        row = {"seed": seed, "heads": len(found), "loss": clean}
        for name, chosen in (("all", found), ("top5", found[:5])):
            drawn = same_layers(opened, chosen, found, seed)
            row[f"rise_{name}"] = repeated_loss(opened, ids, question, chosen) - clean
            row[f"rise_random_{name}"] = repeated_loss(opened, ids, question, drawn) - clean
        rows.append(row)
    holds = all(r["rise_all"] > 0.5 and r["rise_all"] > 5 * max(r["rise_random_all"], 0.0) for r in rows)
    mean = pd.DataFrame(rows).mean()
    return Finding(
        measured={"seeds": rows, "rise_all": mean["rise_all"], "rise_random_all": mean["rise_random_all"]},
        expected="On every seed the loss rises by more than 0.5 nats and 5 times as much as for random heads.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Silencing {mean['heads']:.0f} induction heads raises the loss on repeated tokens from "
            f"{mean['loss']:.2f} by {mean['rise_all']:.2f} nats, as many random heads of the same layers by "
            f"{mean['rise_random_all']:.2f}."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def _pairs(table: pd.DataFrame) -> Heads:
    return [(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]


def same_layers(opened: Opened, chosen: Heads, barred: Heads, seed: int) -> Heads:
    """As many random heads of each layer as there are chosen ones, none of them barred (as far as the layer has
    others)."""
    draw = random.Random(seed)
    sizes = {site.layer: site.heads for site in opened.sites if site.stream == "text"}
    drawn: Heads = []
    for layer, count in Counter(layer for layer, _ in chosen).items():
        others = [(layer, head) for head in range(sizes[layer]) if (layer, head) not in barred]
        drawn += draw.sample(others, min(count, len(others)))
    return drawn


@torch.no_grad()
def repeated_loss(opened: Opened, ids: Tensor, question: scan.InductionHeads, silenced: Heads | None = None) -> float:
    """Mean loss of the tokens of the second and later copies."""
    start = ids.shape[1] - question.length * (question.repeats - 1)
    edits = [HeadGain(heads=silenced, gain=0.0)] if silenced else []
    with attend(opened, edits=edits):
        logits = opened.model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, start - 1 : -1].flatten(0, 1).float(), ids[:, start:].flatten()).item()
