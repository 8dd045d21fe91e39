"""Heads made stronger or weaker: `z'_h = g z_h`. 0 masks a head out, -1 turns what it writes around."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from headwise.attention import Edit, HeadGain
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, Space, pairs


@dataclass(frozen=True)
class ScaleHeads(Method):
    """Multiplies the outputs of heads by `gain`, before the output projection; for queries of a segment (None: all)."""

    heads: Heads = None
    gain: float = 0.0
    tokens: str | None = None
    what: ClassVar[str] = "heads made stronger, weaker, or masked out"
    space: ClassVar[Space] = {"gain": (1.0, 0.0, 0.5, 1.5, 2.0)}
    paper: ClassVar[Paper] = Paper("Are Sixteen Heads Really Better than One?", "1905.10650")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.gain):
            raise HeadwiseError(f"ScaleHeads(gain=...) must be a finite number; got {self.gain!r}.")

    def edits(self, opened: Opened) -> list[Edit]:
        if self.gain == 1:
            return []
        return [HeadGain(gain=self.gain, heads=pairs(self.heads, opened), tokens=self.tokens)]
