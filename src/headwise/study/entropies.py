"""Do the bottom blocks of a vision transformer write features of low entropy, and does transfer entropy choose well?"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
from torch.nn import functional as F

from headwise import scan
from headwise.models import Opened, open_model
from headwise.scan.entropies import PAPER, final_features
from headwise.study.finding import Finding
from headwise.study.photographs import PHOTOGRAPHS, photographs
from headwise.study.registry import study
from headwise.study.retrieval import spearman
from headwise.study.train import build


@study(
    "feature_entropy_depth",
    paper=PAPER,
    room="scan",
    claim="In a vision transformer attention and the MLP after it write features of lower entropy the lower the block.",
)
def feature_entropy_depth(
    model: Any = "zoo:vit", seeds: Sequence[int] = (0, 1, 2), crops: int = 96, size: int = 140
) -> Finding:
    """Rank correlation of the block's number with the entropy over the class tokens of random crops, each seed its own
    crops. Beside it: the same over all tokens, and for the same architecture with random weights."""
    opened = model if isinstance(model, Opened) else open_model(model)
    untrained = open_model(build(lambda: type(opened.model)(deepcopy(opened.model.config)).eval()))
    rows = []
    for seed in seeds:
        batches = photographs(PHOTOGRAPHS, crops, size, seed).to(opened.device).split(16)
        inputs = [{"pixel_values": batch} for batch in batches]
        row: dict[str, Any] = {"seed": seed}
        for name, one, tokens in (
            ("class", opened, "first"),
            ("all", opened, "all"),
            ("untrained", untrained, "first"),
        ):
            found = scan.heads(one, inputs=inputs, questions=[scan.FeatureEntropy(tokens=tokens)]).data
            profile = found["feature_entropy_layer"].isel(stream=0)
            for place in ("attention", "mlp"):
                values = profile.sel(place=f"{place}_out").values
                row |= {f"{place}_{name}": rank_correlation(values), f"{place}_{name}_profile": values}
        rows.append(row)
    least = {place: min(row[f"{place}_class"] for row in rows) for place in ("attention", "mlp")}
    holds = min(least.values()) > 0.5

    def mean_of(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    return Finding(
        measured={"seeds": rows, "least": least},
        expected="A rank correlation with depth above 0.5 for both, with every seed.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Over class tokens the rank correlation of entropy with depth is at least {least['attention']:.2f} for "
            f"attention and {least['mlp']:.2f} for the MLP (a DINOv2 with layer scales, read before them); over all "
            f"tokens it is {mean_of('attention_all'):.2f} and {mean_of('mlp_all'):.2f} on average, with random weights "
            f"{mean_of('attention_untrained'):.2f} and {mean_of('mlp_untrained'):.2f}."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


@study(
    "transfer_entropy_choice",
    paper=PAPER,
    room="scan",
    claim="The attention layers of least transfer entropy are those whose removal disturbs the final features least.",
)
def transfer_entropy_choice(
    model: Any = "zoo:vit", seeds: Sequence[int] = (0, 1, 2), crops: int = 48, size: int = 140
) -> Finding:
    """Every attention alone is replaced by the identity. Transfer entropy comes from crops of three photographs, the
    disturbance (1 - cosine of the final class features) from crops of three others. The control ranks the layers by
    depth."""
    opened = model if isinstance(model, Opened) else open_model(model)
    half = len(PHOTOGRAPHS) // 2
    rows = []
    for seed in seeds:
        seen, held = (
            [{"pixel_values": x} for x in photographs(some, crops, size, seed).to(opened.device).split(16)]
            for some in (PHOTOGRAPHS[:half], PHOTOGRAPHS[half:])
        )
        transfer = scan.transfer_entropy(opened, seen)
        whole = final_features(opened, held)
        moved = [
            1 - F.cosine_similarity(final_features(opened, held, [layer]), whole).mean().item()
            for layer in transfer["layer"].values.tolist()
        ]
        rows.append(
            {
                "seed": seed,
                "correlation": rank_correlation(moved, transfer.values),
                "correlation_depth": rank_correlation(moved),
                "transfer_entropy": transfer.values,
                "disturbance": moved,
            }
        )
    least = min(row["correlation"] for row in rows)
    return Finding(
        measured={"seeds": rows, "least": least},
        expected="A rank correlation of transfer entropy with the disturbance above 0.5, with every seed.",
        verdict="holds" if least > 0.5 else "fails",
        reason=(
            f"The rank correlation over the layers is at least {least:.2f}; depth alone gives "
            f"{np.mean([row['correlation_depth'] for row in rows]):.2f} on average."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def rank_correlation(values: Sequence[float], other: Sequence[float] | None = None) -> float:
    """Spearman's, with the place in the list where there is no other."""
    return spearman(pd.Series(values), pd.Series(np.arange(len(values)) if other is None else other))
