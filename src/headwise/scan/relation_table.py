"""The best head for every grammatical relation, chosen on some sentences and scored on others."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import xarray as xr

from headwise.models import Opened
from headwise.scan.grammar import Sentence
from headwise.scan.relations import OFFSETS, RELATIONS, RelationHeads, offset_accuracy
from headwise.scan.run import heads


def relation_heads(
    opened: Opened,
    train: Sequence[Sentence],
    test: Sequence[Sentence],
    relations: Sequence[str] = RELATIONS,
    offsets: Sequence[int] = OFFSETS,
) -> pd.DataFrame:
    """A row a relation: the head and direction with the highest accuracy on `train`, that accuracy, its accuracy on
    `test`, the mean accuracy of all heads there (better direction each), and the fixed offset, chosen and scored the
    same way (Clark et al., 2019, table 1).

    >>> relation_heads(opened, grammar.sentences(200, seed=0), grammar.sentences(200, seed=1))
    """
    chosen, scored = (accuracy(opened, part, relations) for part in (train, test))
    fixed, fixed_test = (offset_accuracy(part, relations, offsets) for part in (train, test))
    rows = []
    for relation in relations:
        here = chosen.sel(relation=relation)
        best = {dim: int(place) for dim, place in here.argmax(...).items()}
        offset = int(fixed.sel(relation=relation).idxmax())
        rows.append(
            {
                "relation": relation,
                "layer": best["layer"],
                "head": best["head"],
                "direction": str(here["direction"][best["direction"]].item()),
                "train": float(here.isel(best)),
                "accuracy": float(scored.sel(relation=relation).isel(best)),
                "all_heads": float(scored.sel(relation=relation).max("direction").mean()),
                "offset": offset,
                "baseline": float(fixed_test.sel(relation=relation, offset=offset)),
            }
        )
    return pd.DataFrame(rows)


def accuracy(opened: Opened, corpus: Sequence[Sentence], relations: Sequence[str]) -> xr.DataArray:
    """Dims relation, direction, layer, head."""
    question = RelationHeads(corpus=tuple(corpus), relations=tuple(relations))
    return heads(opened, questions=[question]).data["relation_accuracy"].sel(stream="text", drop=True)
