"""Do induction heads recall like people, where in the model do such heads stand, and does it need them?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.cmr import cmr_fit, gaussian_distance
from headwise.study.finding import Finding
from headwise.study.icl import EARLY, LATE, icl_without, paired
from headwise.study.registry import study
from headwise.study.sinks import windows

PAPER = Paper("Linking In-context Learning in Transformers to Human Episodic Memory", "2405.14992")
LIKE = 0.5
"""A head with a CMR distance below this is "CMR-like"."""


@study(
    "cmr_induction",
    paper=PAPER,
    room="scan",
    claim="Heads with a high induction score have a low CMR distance, and look forwards from the earlier copy.",
)
def cmr_induction(
    model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1), question: scan.CmrDistance | None = None
) -> Finding:
    """Induction score and lag curve come from different random tokens. Control: the same curves mirrored (lag +1 takes
    the place of -1), fitted anew. The Gaussian fit is reported beside."""
    opened = model if isinstance(model, Opened) else open_model(model)
    spearman = need("scipy.stats", "analysis").spearmanr
    threshold = scan.InductionHeads().threshold
    rows = []
    for seed in seeds:
        lists = replace(question or scan.CmrDistance(), first_seed=100 * seed)
        found = scan.heads(opened, questions=[lists, scan.InductionHeads(first_seed=5000 + 100 * seed)])
        table = found.heads
        curve = found.data["lag_curve"].sel(stream="text", lag=slice(-lists.fit_lag, lists.fit_lag)).values
        curve = curve[table["layer"], table["head"]]
        strong = (table["induction_heads"] >= threshold).values
        if not strong.any():
            raise HeadwiseError(f"{opened.name} has no head with a prefix matching of {threshold}.")
        known = table["cmr_distance"].notna()
        rho = spearman(table["induction_heads"][known], table["cmr_distance"][known])
        like = (table["cmr_distance"] < LIKE).values
        rows.append(
            {
                "seed": seed,
                "rank_correlation": rho.statistic,
                "p": rho.pvalue,
                "induction_heads": int(strong.sum()),
                "distance_induction": table["cmr_distance"][strong].median(),
                "distance_others": table["cmr_distance"][~strong].median(),
                "distance_mirrored": np.nanmedian(cmr_fit(curve[strong, ::-1]).distance),
                "forward_share": (table["recall_asymmetry"][strong] > 0).mean(),
                "forward_share_all": (table["recall_asymmetry"] > 0).mean(),
                "cmr_like": int(like.sum()),
                "gaussian_induction": np.nanmedian(gaussian_distance(curve[strong])),
            }
        )
    holds = all(
        r["rank_correlation"] < -0.2
        and r["p"] < 0.01
        and r["forward_share"] >= 0.9
        and r["distance_induction"] < r["distance_mirrored"]
        for r in rows
    )
    first, rhos = rows[0], [r["rank_correlation"] for r in rows]
    return Finding(
        measured={"seeds": rows},
        expected=(
            "On every seed: rank correlation below -0.2 (p < 0.01), at least 90% of induction heads with more score at "
            "lag +1 than at -1, and their curves nearer to the model than when mirrored."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Rank correlation {', '.join(f'{rho:.2f}' for rho in rhos)}; {first['induction_heads']} induction heads "
            f"have a median distance of {first['distance_induction']:.3f} "
            f"({first['distance_mirrored']:.3f} mirrored), other heads {first['distance_others']:.2f}; "
            f"{first['forward_share']:.0%} of them look forwards."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


@study(
    "cmr_depth",
    paper=PAPER,
    room="scan",
    claim="The share of CMR-like heads is highest in the middle to late layers.",
)
def cmr_depth(
    model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1), question: scan.CmrDistance | None = None
) -> Finding:
    """Share of heads with a CMR distance below 0.5 in every layer, averaged over five layers, and the depth (0 first, 1
    last layer) where it is highest."""
    opened = model if isinstance(model, Opened) else open_model(model)
    shares, depths = [], []
    for seed in seeds:
        lists = replace(question or scan.CmrDistance(), first_seed=1000 + 100 * seed)
        table = scan.heads(opened, questions=[lists]).heads
        share = (table["cmr_distance"] < LIKE).groupby(table["layer"]).mean()
        smooth = share.rolling(5, center=True, min_periods=1).mean()
        shares.append(share.round(3).tolist())
        depths.append(float(smooth.idxmax() / max(share.index.max(), 1)))
    holds = all(0.4 <= depth <= 0.9 for depth in depths)
    return Finding(
        measured={"depth_of_peak": depths, "share_by_layer": shares},
        expected="On every seed the highest share lies at a depth of 0.4 to 0.9.",
        verdict="holds" if holds else "fails",
        reason=(
            f"The share of CMR-like heads is highest at depth {', '.join(f'{d:.2f}' for d in depths)}; "
            f"over all layers it is {np.mean(shares):.0%}."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


@study(
    "cmr_ablation",
    paper=PAPER,
    room="scan",
    claim="Silencing the 10% most CMR-like heads hurts in-context learning more than silencing random heads.",
)
def cmr_ablation(
    model: Any = "zoo:llm",
    seeds: Sequence[int] = (0, 1),
    texts: int = 16,
    share: float = 0.1,
    question: scan.CmrDistance | None = None,
    early: tuple[int, int] = EARLY,
    late: tuple[int, int] = LATE,
) -> Finding:
    """ICL score: loss at tokens 490 to 510 minus loss at 45 to 55 of windows of a novel; the random heads are any
    others, the silenced ones left out (the paper's own code lets them overlap)."""
    opened = model if isinstance(model, Opened) else open_model(model)
    table = scan.heads(opened, questions=[question or scan.CmrDistance(first_seed=2000)]).heads
    order = table.dropna(subset=["cmr_distance"]).sort_values("cmr_distance", kind="stable")
    everyone = [(int(r.layer), int(r.head)) for r in order.itertuples()]
    count = max(1, round(share * len(table)))
    ids = windows(opened, texts, late[1])
    clean = icl_without(opened, ids, [], early, late)
    without = icl_without(opened, ids, everyone[:count], early, late)
    drawn = [
        icl_without(opened, ids, random.Random(seed).sample(everyone[count:], count), early, late) for seed in seeds
    ]
    rise, rises = float((without - clean).mean()), [float((x - clean).mean()) for x in drawn]
    p = paired(without, np.mean(drawn, 0))
    holds = all(rise > x for x in rises) and rise > 0 and p < 0.05
    return Finding(
        measured={
            "score": clean.mean(),
            "heads": count,
            "largest_distance": order["cmr_distance"].iloc[count - 1],
            "rise_cmr": rise,
            "rise_random": rises,
            "p_cmr_against_random": p,
            "p_cmr_against_clean": paired(without, clean),
            "texts": texts,
        },
        expected="The score rises, more than for each draw of random heads, with p < 0.05 in a paired t-test.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Without the {count} most CMR-like heads the score goes from {clean.mean():.2f} by {rise:+.2f} nats, "
            f"without as many random heads by {np.mean(rises):+.2f} (p = {p:.2g}, {texts} windows)."
        ),
        model=opened.name,
        seeds=list(seeds),
    )
