"""Does a model learn less from the text it has read when its induction heads are silenced?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from headwise import scan
from headwise.attention import HeadGain, attend
from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.study.finding import Finding
from headwise.study.induction import Heads, same_layers
from headwise.study.registry import study
from headwise.study.sinks import windows

EARLY, LATE = (45, 55), (490, 510)
"""Places whose losses are averaged: single tokens (50 and 500) would need thousands of texts."""


@study(
    "icl_induction",
    paper=Paper("In-context Learning and Induction Heads", "2209.11895"),
    room="scan",
    claim="Silencing the five strongest induction heads makes the in-context-learning score on text less negative.",
)
def icl_induction(
    model: Any = "zoo:llm",
    seeds: Sequence[int] = (0, 1),
    texts: int = 16,
    early: tuple[int, int] = EARLY,
    late: tuple[int, int] = LATE,
) -> Finding:
    """ICL score: loss at tokens 490 to 510 minus loss at 45 to 55 of windows of a novel; the windows overlap, the late
    tokens don't. Compared with five random heads of the same layers, none of them an induction head, and beside it all
    heads with a prefix matching of at least 0.4."""
    opened = model if isinstance(model, Opened) else open_model(model)
    scored = scan.heads(opened, questions=[scan.InductionHeads(seeds=2, first_seed=1000)])
    pattern = scored.pattern("induction_heads")
    try:
        found = pattern.pairs(above=scan.InductionHeads().threshold)
    except HeadwiseError as error:
        raise HeadwiseError(f"{opened.name} has no induction head to silence: {error}") from None
    top = found[:5]
    ids = windows(opened, texts, late[1])
    clean = icl_without(opened, ids, [], early, late)
    without = icl_without(opened, ids, top, early, late)
    whole = icl_without(opened, ids, found, early, late)
    drawn = [icl_without(opened, ids, same_layers(opened, top, found, seed), early, late) for seed in seeds]
    rises = [float((x - clean).mean()) for x in drawn]
    rise, p = float((without - clean).mean()), paired(without, np.mean(drawn, 0))
    holds = rise > 0 and all(rise > x for x in rises) and p < 0.05
    return Finding(
        measured={
            "score": clean.mean(),
            "rise_top5": rise,
            "rise_random5": rises,
            "p_top5_against_random5": p,
            "rise_all": (whole - clean).mean(),
            "heads_all": len(found),
            "texts": texts,
        },
        expected="The score rises, more than for each draw of random heads, with p < 0.05 in a paired t-test.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Without the top {len(top)} induction heads the score goes from {clean.mean():.2f} by {rise:+.3f} nats, "
            f"without as many random heads by {np.mean(rises):+.3f} (p = {p:.2g}, {texts} windows)."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def icl_without(
    opened: Opened, ids: Int[Tensor, "text token"], silenced: Heads, early: tuple[int, int], late: tuple[int, int]
) -> Float[np.ndarray, " text"]:
    """The in-context-learning score of every text, with the outputs of these heads times 0."""
    edits = [HeadGain(heads=silenced, gain=0.0)] if silenced else []
    with attend(opened, edits=edits):
        return scan.icl_score(opened, ids, early, late).per_text


def paired(one: Float[np.ndarray, " text"], other: Float[np.ndarray, " text"]) -> float:
    """Two-sided p of the paired t-test; 1 where nothing differs."""
    return 1.0 if np.array_equal(one, other) else float(need("scipy.stats", "analysis").ttest_rel(one, other).pvalue)
