"""Attention knockout: queries of one segment no longer see keys of another, `s_ij = -inf`.

What a later token then fails to do shows what passed along that edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headwise.attention import Edit, ScoreBias
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, pairs
from headwise.steer.pattern_mask import Keys, any_keys


@dataclass(frozen=True)
class Knockout(Method):
    """Cuts the attention from queries of `queries` (None: all) to keys of `keys`, in some layers or heads (None: all).

    Both may be several segments, so that all edges between them are cut; keys may also be bools over keys, or a rule
    `(b, h, i, j)` that names the edges one by one. A query that is left with no key at all writes nothing."""

    keys: Keys | tuple[str, ...]
    queries: str | tuple[str, ...] | None = None
    layers: Sequence[int] | None = None
    heads: Heads = None
    what: ClassVar[str] = "no attention from one segment to another"
    paper: ClassVar[Paper] = Paper(
        "Dissecting Recall of Factual Associations in Auto-Regressive Language Models", "2304.14767"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and self.heads is not None:
            raise HeadwiseError("Knockout: give layers= or heads=, not both.")
        if any(isinstance(names, tuple) and not names for names in (self.keys, self.queries)):
            raise HeadwiseError("Knockout: keys= and queries= must name at least one segment each.")
        if self.layers is not None and not len(self.layers):
            raise HeadwiseError("Knockout: layers= must name at least one layer, or be None for all.")

    def edits(self, opened: Opened) -> list[Edit]:
        chosen = pairs(self.heads, opened)
        layers = None if self.layers is None else tuple(self.layers)
        keys = self.keys if isinstance(self.keys, tuple) else (self.keys,)
        queries = self.queries if isinstance(self.queries, tuple) else (self.queries,)
        return [
            ScoreBias(-math.inf, keys=any_keys(k), queries=q, layer=layers, heads=chosen) for k in keys for q in queries
        ]
