"""Heads made more even: `z'_i = (1 - lam) z_i + lam mean_j v_j`, j the keys the query sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headwise.attention import Blend, Edit
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, Space, pairs


@dataclass(frozen=True)
class UniformMix(Method):
    """Mixes uniform attention into heads after their softmax; lam 1 leaves nothing else. A probe without training of
    what context broadcasting trains with; for queries of a segment (None: all)."""

    heads: Heads = None
    lam: float = 0.5
    tokens: str | None = None
    what: ClassVar[str] = "uniform attention mixed into heads"
    space: ClassVar[Space] = {"lam": (0.0, 0.1, 0.25, 0.5)}
    paper: ClassVar[Paper] = Paper("Scratching Visual Transformer's Back with Uniform Attention", "2210.08457")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam <= 1:
            raise HeadwiseError(f"UniformMix(lam=...) must be between 0 and 1; got {self.lam!r}.")

    def edits(self, opened: Opened) -> list[Edit]:
        if self.lam == 0:
            return []
        return [Blend(alpha=self.lam, target="uniform", heads=pairs(self.heads, opened), tokens=self.tokens)]
