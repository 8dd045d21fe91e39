"""Two models, or two checkpoints of one, side by side: the same questions, aligned by layer and head.

Beside the scores stands how alike the heads are: the similarity of their attention maps (`head_similarity`, Jensen-
Shannon), of the head at the same place and of the best match anywhere; and of layers (`layer_similarity`, linear CKA).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr
from torch import nn

from headwise.errors import HeadwiseError
from headwise.models import Opened, open_model
from headwise.scan.head_similarity import head_similarity
from headwise.scan.layer_similarity import layer_similarity
from headwise.scan.question import Question
from headwise.scan.result import PLACE, Scan
from headwise.scan.run import heads

CHARACTERS = 1200
"""So much of each text is compared map by map: about 250 tokens."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """`one` and `other` are the two scans. `similarity` holds `heads` (layer_a, head_a, layer_b, head_b) and `layers`
    (layer_a, layer_b), or nothing where only saved scans were compared."""

    one: Scan
    other: Scan
    similarity: xr.Dataset

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called; two of one name are told apart by their weights, or by their order."""
        both = [scan.about["model"] for scan in (self.one, self.other)]
        for marks in (("", ""), [f" ({m['fingerprint']})" for m in both], (" (first)", " (second)")):
            first, second = (m["name"] + mark for m, mark in zip(both, marks, strict=True))
            if first != second:
                break
        return first, second

    @cached_property
    def columns(self) -> list[dict[str, Any]]:
        """The columns both scans have."""
        known = {column["name"] for column in self.other.about["columns"]}
        return [column for column in self.one.about["columns"] if column["name"] in known]

    @cached_property
    def heads(self) -> pd.DataFrame:
        """A row per head of either: roles, `similarity` and `best_match` where known, and for every column `<column>`,
        `<column>_other` and `<column>_change` (other minus one); nan where one of the two has no such head."""
        names = [column["name"] for column in self.columns]
        kept = [*PLACE, "role", *names]
        table = self.one.heads[kept].merge(self.other.heads[kept], on=list(PLACE), how="outer", suffixes=("", "_other"))
        changes = {f"{name}_change": table[f"{name}_other"] - table[name] for name in names}
        order = [*PLACE, "role", "role_other"]
        for name in names:
            order += [name, f"{name}_other", f"{name}_change"]
        return table.assign(**changes)[order].merge(self.matches(), on=list(PLACE), how="left")

    def matches(self) -> pd.DataFrame:
        """For every head of `one`: its similarity to the head at the same place of `other`, to its best match anywhere,
        and where that is."""
        columns = [*PLACE, "similarity", "best_similarity", "best_match"]
        if "heads" not in self.similarity:
            return pd.DataFrame(columns=columns).astype({"stream": str, "layer": int, "head": int})
        found = self.similarity["heads"]
        rows = []
        for layer in found["layer_a"].values.tolist():
            for head in found["head_a"].values.tolist():
                one = found.sel(layer_a=layer, head_a=head)
                there = layer in one["layer_b"] and head in one["head_b"]
                same = float(one.sel(layer_b=layer, head_b=head)) if there else float("nan")
                best = one.argmax(("layer_b", "head_b"))
                place = "L{}.H{}".format(*(int(one[d][best[d]]) for d in ("layer_b", "head_b")))
                rows.append([found.attrs["stream"], layer, head, same, float(one.isel(best)), place])
        return pd.DataFrame(rows, columns=columns)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row per column: the means, the correlation over shared heads (Spearman), how many of the ten highest heads
        are the same, and the head that changes most."""
        rows = []
        for column in self.columns:
            name = column["name"]
            table = self.heads[[*PLACE, name, f"{name}_other", f"{name}_change"]]
            both = table.dropna(subset=f"{name}_change")
            tops = [table.nlargest(10, c).index for c in (name, f"{name}_other")]
            most = both.loc[both[f"{name}_change"].abs().nlargest(1).index]
            rows.append(
                {
                    "column": name,
                    "title": column["title"],
                    "mean": table[name].mean(),
                    "mean_other": table[f"{name}_other"].mean(),
                    "spearman": both[name].rank().corr(both[f"{name}_other"].rank()),
                    "shared_top10": len(tops[0].intersection(tops[1])),
                    "most_changed": next((f"{r.stream} L{r.layer}.H{r.head}" for r in most.itertuples()), None),
                    "change": most[f"{name}_change"].squeeze() if len(most) else float("nan"),
                }
            )
        return pd.DataFrame(rows)

    def payload(self) -> dict[str, Any]:
        """What the report draws: for every column the one, the other and the difference."""
        from headwise.scan.comparison_payload import payload

        return payload(self)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page: one file that needs no network."""
        from headwise.studio import write_report  # as in Scan.to_html

        write_report(self.payload(), path)
        return Path(path)

    def _repr_html_(self) -> str:
        return f"<p><b>{escape(' and '.join(self.names))}</b></p>{self.summary.to_html(index=False)}"

    def __repr__(self) -> str:
        return f"Comparison({' and '.join(self.names)}; {len(self.heads)} heads; {len(self.columns)} columns)"


def compare(
    one: Scan | Opened | nn.Module | str,
    other: Scan | Opened | nn.Module | str,
    texts: str | Sequence[str] | None = None,
    inputs: Sequence[Any] | None = None,
    questions: Sequence[str | Question] | str | None = None,
    queries: int | str | Sequence[int] = "all",
    seed: int = 0,
    progress: bool | None = None,
    command: str = "",
) -> Comparison:
    """Asks the same questions of both about the same texts or inputs. A `Scan` that is there already is taken as it is;
    two models are compared head by head and layer by layer as well.

    >>> scan.compare("zoo:llm", "checkpoint-500", texts=["..."]).summary
    """
    opened = [m if isinstance(m, Scan | Opened) else open_model(m) for m in (one, other)]
    asked = {"questions": questions, "queries": queries, "seed": seed, "progress": progress, "command": command}
    given = [texts] if isinstance(texts, str) else texts
    scans = [m if isinstance(m, Scan) else heads(m, given, list(inputs or []) or None, **asked) for m in opened]
    return side_by_side(scans, opened, list(given or inputs or []), seed)


def side_by_side(
    scans: Sequence[Scan], opened: Sequence[Scan | Opened], inputs: list[Any], seed: int = 0
) -> Comparison:
    """Two scans that are made, with the similarity of their models where both are here."""
    comparison = Comparison(scans[0], scans[1], xr.Dataset())
    if not comparison.columns:
        raise HeadwiseError("compare: the two scans have no column in common: ask the same questions of both.")
    pair = [m for m in opened if isinstance(m, Opened)]
    return Comparison(scans[0], scans[1], alike(*pair, inputs, seed)) if len(pair) == 2 else comparison


def alike(one: Opened, other: Opened, inputs: list[Any], seed: int) -> xr.Dataset:
    """Similarity of heads and of layers on the beginning of every input; nothing without inputs. Models that split text
    differently are compared word by word."""
    inputs = [beginning(x) if isinstance(x, str) else x for x in inputs]
    if not inputs:
        return xr.Dataset()
    unit = "token" if all(same_ids(one, other, x) for x in inputs) else "word"
    found = head_similarity(one, other, inputs, unit=unit, seed=seed)
    layers = layer_similarity(one, other, inputs, rows=unit)
    stream = "text" if "text" in one.streams else one.streams[0]
    return xr.Dataset({"heads": found.assign_attrs(stream=stream), "layers": layers})


def beginning(text: str) -> str:
    """The first words of a text."""
    return text if len(text) <= CHARACTERS else text[:CHARACTERS].rsplit(maxsplit=1)[0]


def same_ids(one: Opened, other: Opened, given: Any) -> bool:
    a, b = (model.encode(given).get("input_ids") for model in (one, other))
    return a is None or b is None or torch.equal(a.cpu(), b.cpu())
