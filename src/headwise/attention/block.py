"""The running sums of a block of query rows, while its keys are walked tile by tile."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention.dense import BLOCKED

LOG2E = 1 / math.log(2)
LANE = 64
"""Tiles are multiples of this wide; the place of a maximum is looked for in one lane only."""


@dataclass
class Block:
    """Running sums of a block of rows: m, the maximum so far; total, the normaliser (sink included); mass, keys only;
    `spread` is sum p (s - m). m, base and spread are in units of log 2, lse is not."""

    m: Float[Tensor, "batch heads row"]
    total: Float[Tensor, "batch heads row"]
    mass: Float[Tensor, "batch heads row"]
    sums: dict[str, Tensor] = field(default_factory=dict)
    tiles: list[tuple[int, int]] = field(default_factory=list)
    top: Tensor | None = None
    place: Tensor | None = None

    def add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def find_top(self, s: Tensor, start: int) -> Float[Tensor, "batch heads row"]:
        """The tile's maximum per row; keeps where it is when it beats the tiles before."""
        lanes = s.view(-1, s.shape[-1] // LANE, LANE)
        high, lane = lanes.amax(-1).max(-1)
        # Whole lanes are copied, and the first place that has the maximum is a maximum too: `gather` and `argmax` cost
        # three times as much on a CPU.
        first = torch.arange(len(lanes), device=s.device) * lanes.shape[1]
        best = lanes.flatten(0, 1).index_select(0, first + lane)
        countdown = torch.arange(LANE, 0, -1, dtype=s.dtype, device=s.device)
        inside = LANE - ((best == high[:, None]) * countdown).amax(-1).long()
        high, place = high.view(s.shape[:-1]), (start + lane * LANE + inside).view(s.shape[:-1])
        if self.top is None or self.place is None:
            self.top, self.place = high, place
        else:
            better = high > self.top
            self.top, self.place = torch.where(better, high, self.top), torch.where(better, place, self.place)
        return high

    def raise_to(self, m: Float[Tensor, "batch heads row"]) -> None:
        """A new maximum: every sum so far shrinks by 2^(old - new)."""
        down = self.m - m
        shrink = down.exp2()
        for name, of in (("spread", self.mass), ("inner", self.sums.get("inner_mass"))):
            if name in self.sums and of is not None:
                self.sums[name] += (down if of.ndim == 3 else down[..., None]) * of
        for value in self.sums.values():
            value *= shrink if value.ndim == 3 else shrink[..., None]
        self.total, self.mass, self.m = self.total * shrink, self.mass * shrink, m

    def close(self, lse: Float[Tensor, "batch heads row"] | None) -> None:
        """Sets lse, base (what weights are normalised by) and share = 2^(m - base); 0 for rows that see nothing."""
        dead = (self.m < BLOCKED) | (self.total == 0)
        own = (self.m + self.total.log2()).masked_fill(dead, float("-inf"))
        self.lse = own / LOG2E if lse is None else lse
        self.base = (own if lse is None else lse * LOG2E).masked_fill(dead, 0.0)
        self.share = (self.m - self.base).exp2().masked_fill(dead, 0.0)

    lse: Tensor = field(init=False)
    base: Tensor = field(init=False)
    share: Tensor = field(init=False)
