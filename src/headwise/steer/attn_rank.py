"""AttnRank: the most relevant items put where the model looks most.

The model is asked once how much it attends to each place of a list (the basin profile P of `scan.Basin`); places are
sorted by P, items by relevance, and the item of rank r is put into the place of rank r. Nothing in the model changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from headwise.attention import Edit, ScoreBias
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Method, Space

PAPER = Paper("Attention Basin: Why Contextual Position Matters in Large Language Models", "2508.05128")
T = TypeVar("T")


def attn_rank(profile: Sequence[float], relevance: Sequence[float]) -> list[int]:
    """The items (numbers) in the order they should stand; ties keep the order they came in."""
    if len(profile) != len(relevance) or not len(profile):
        raise HeadwiseError(
            f"attn_rank wants as many places in profile as items in relevance; got {len(profile)} and {len(relevance)}."
        )
    places = sorted(range(len(profile)), key=lambda k: -profile[k])
    items = sorted(range(len(relevance)), key=lambda k: -relevance[k])
    order = [0] * len(places)
    for place, item in zip(places, items, strict=True):
        order[place] = item
    return order


def rerank(items: Sequence[T], profile: Sequence[float], relevance: Sequence[float]) -> list[T]:
    """The items in that order, to be put into the prompt.

    >>> rerank(["dull", "apt", "so-so"], profile=[0.3, 0.1, 0.5], relevance=[0, 9, 4])
    ['so-so', 'dull', 'apt']
    """
    if len(items) != len(relevance):
        raise HeadwiseError(f"rerank wants a relevance for each of {len(items)} items; got {len(relevance)}.")
    return [items[n] for n in attn_rank(profile, relevance)]


@dataclass(frozen=True)
class FlattenBasin(Method):
    """Ours, inside the model: `s_ij -= strength log(P_k / mean P)` for keys of item k, so that every place gets more
    nearly the same. `items` are segment names, `profile` the P of their places."""

    items: tuple[str, ...]
    profile: tuple[float, ...]
    strength: float = 1.0
    what: ClassVar[str] = "the same attention for every place of a list"
    space: ClassVar[Space] = {"strength": (0.0, 0.25, 0.5, 1.0)}
    paper: ClassVar[Paper] = PAPER

    def __post_init__(self) -> None:
        super().__post_init__()
        above = all(0 < p < math.inf for p in self.profile)
        if len(self.items) != len(self.profile) or len(self.items) < 2 or not above:
            raise HeadwiseError(
                "FlattenBasin wants two or more items= and for each a number above 0 in profile=; got "
                f"{self.items!r} and {self.profile!r}."
            )
        if not math.isfinite(self.strength):
            raise HeadwiseError(f"FlattenBasin(strength=...) must be a finite number; got {self.strength!r}.")

    def edits(self, opened: Opened) -> list[Edit]:
        if self.strength == 0:
            return []
        mean = sum(self.profile) / len(self.profile)
        return [
            ScoreBias(-self.strength * math.log(p / mean), keys=item)
            for item, p in zip(self.items, self.profile, strict=True)
            if p != mean
        ]
