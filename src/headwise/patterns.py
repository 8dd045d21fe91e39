"""A head pattern: which heads do something, how strongly, in which model, by which question: a small JSON file.

Made by `Scan.pattern`; whatever takes heads takes its pairs: `HeadGain(heads=pattern.pairs(10), gain=0.0)`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from headwise.errors import HeadwiseError
from headwise.files import replacing

PLACE = ["stream", "layer", "head"]


class HeadScore(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    stream: str
    layer: int
    head: int
    score: float


class HeadPattern(BaseModel):
    """Scores of heads with where they come from. Heads without a score (nan) are left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headwise head pattern 1"] = "headwise head pattern 1"
    question: str
    """The column of the scan, such as "induction_heads"."""
    paper: dict[str, str] = {}
    model: str
    fingerprint: str
    seed: int | None = None
    created: str = ""
    versions: dict[str, str] = {}
    heads: tuple[HeadScore, ...]

    @property
    def table(self) -> pd.DataFrame:
        """stream, layer, head, score; the highest first."""
        rows = pd.DataFrame([h.model_dump() for h in self.heads], columns=[*PLACE, "score"])
        return rows.sort_values("score", ascending=False, kind="stable", ignore_index=True)

    def pairs(
        self, n: int | None = None, above: float | None = None, stream: str | None = None
    ) -> list[tuple[int, int]]:
        """(layer, head) of the n highest, or of those with a score of at least `above`, in one stream (None: the only
        one the pattern has)."""
        table = self.table
        streams = list(dict.fromkeys(table["stream"]))
        if not streams:
            raise HeadwiseError(f"The pattern {self.question!r} has no heads: none had a score.")
        if stream is None and len(streams) > 1:
            raise HeadwiseError(f"stream: the pattern has heads of {', '.join(streams)}; name one.")
        if stream is not None and stream not in streams:
            raise HeadwiseError(f"stream: the pattern has heads of {', '.join(streams)}; got {stream!r}.")
        table = table[table["stream"] == (stream or streams[0])]
        if above is not None:
            table = table[table["score"] >= above]
        if n is not None and n < 1:
            raise HeadwiseError(f"n: wanted at least 1 head; got {n}.")
        chosen = table if n is None else table.head(n)
        if chosen.empty:
            raise HeadwiseError(f"above: no head of {self.question} has {above}; the highest is {self.highest:.3g}.")
        return [(int(layer), int(head)) for layer, head in zip(chosen["layer"], chosen["head"], strict=True)]

    @property
    def highest(self) -> float:
        return max((h.score for h in self.heads), default=float("nan"))

    def check(self, fingerprint: str, name: str) -> None:
        """Raises where the pattern was found in another model."""
        if fingerprint != self.fingerprint:
            raise HeadwiseError(
                f"The pattern {self.question!r} was found in {self.model} ({self.fingerprint}), not in {name} "
                f"({fingerprint}): scan this model for one of its own."
            )

    def diff(self, other: HeadPattern) -> pd.DataFrame:
        """Heads of both side by side: score, score_other, change; the largest change first."""
        both = self.table.merge(other.table, on=PLACE, how="outer", suffixes=("", "_other"))
        both["change"] = both["score_other"] - both["score"]
        order = both["change"].abs().sort_values(ascending=False, kind="stable").index
        return both.loc[order].reset_index(drop=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        path = Path(path)
        if path.suffix != ".json":
            raise HeadwiseError(f"save: wanted a name that ends in .json; got {str(path)!r}.")
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        path = Path(path)
        try:
            given: Any = json.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(given)
        except OSError as error:
            raise HeadwiseError(f"load: {path} cannot be read: {error.strerror}.") from None
        except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
            first = str(error).splitlines()[0]
            raise HeadwiseError(f"load: {path} is not a head pattern of this version of headwise ({first}).") from None
