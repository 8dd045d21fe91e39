"""Does a head's map depend on what is read, or on positions only?

Dependence on the input: half the L1 distance of the same row of the map in two different inputs of one length,
`1/2 sum_j |a_ij - a'_ij|`, averaged over rows and over all pairs of inputs. 0 is a fixed map (one that a cached table
could replace), 1 are maps that never overlap. The paper trains models whose maps are fixed; this says how near the
heads of a trained model are to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
import torch
import xarray as xr

from headwise.attention.readings import Map, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.mixing import PAPER
from headwise.scan.needles import haystack
from headwise.scan.needs import accepts
from headwise.scan.question import Column, Prompt, Question


@dataclass(frozen=True)
class InputDependence(Question):
    """`input_dependence`, over `sequences` windows of `length` tokens of English prose (no special tokens are added),
    from `rows` random rows of the map."""

    sequences: int = 8
    length: int = 128
    rows: int = 32
    paper: ClassVar[Paper] = PAPER

    def __post_init__(self) -> None:
        for name, least in {"sequences": 2, "length": 2, "rows": 1}.items():
            if getattr(self, name) < least:
                raise HeadwiseError(
                    f"{type(self).__name__}({name}=...) must be at least {least}; got {getattr(self, name)!r}."
                )

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "input_dependence",
                "Dependence on the input",
                "How much of a row of the map moves when another text of the same length is read.",
                "share of attention",
                "looks at content; 0 is a fixed map",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        if opened.tokenizer is None or not self.streams(opened) or not accepts(opened.model, "input_ids"):
            return "self-attention over text, and its tokenizer"
        return None

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"] if any(s.stream == "text" and s.kind == "self" for s in opened.sites) else []

    def prompts(self, opened: Opened) -> list[Prompt]:
        ids = torch.tensor(opened.tokenizer(haystack(), add_special_tokens=False)["input_ids"])
        room = len(ids) if opened.max_positions is None else min(len(ids), opened.max_positions)
        if self.length > room:
            raise HeadwiseError(
                f"{type(self).__name__}(length=...) can be at most {room} tokens here; got {self.length}."
            )
        starts = torch.linspace(0, len(ids) - self.length, self.sequences).long()
        return [Prompt({"input_ids": ids[starts[:, None] + torch.arange(self.length)].to(opened.device)})]

    def readings(self, opened: Opened) -> list[Reading]:
        return [Map(queries=self.rows, stream="text")]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        maps = values["map"].transpose("layer", "sample", "head", "query", "key")
        moved = np.stack([row_distance(layer) for layer in maps.values])
        return xr.Dataset(
            {"moved": (("layer", "head"), moved)}, {"layer": maps["layer"].values, "head": maps["head"].values}
        )

    def score(self, values: xr.Dataset) -> xr.DataArray:
        return values["moved"]


def row_distance(maps: np.ndarray) -> np.ndarray:
    """[sample, head, row, key] -> [head]: the mean over rows and pairs of samples of half the L1 distance."""
    pairs = [np.abs(a - b).sum(-1).mean(-1) / 2 for a, b in combinations(maps, 2)]
    return np.mean(pairs, axis=0)
