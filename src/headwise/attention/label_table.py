"""Segment numbers of positions on the device: copied once, and long enough for the tokens that are still to come."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models.segments import Segments

GENERATED = "generated"
SPARE = 4096
"""Positions the table is longer by than it must be."""


class LabelTable:
    """The labels of one stream: from segments, or "first" and "rest" where there are none."""

    def __init__(self, given: Segments | None, device: torch.device):
        self.given = given
        self.device = device
        self._tables: dict[int, Int[Tensor, "#batch position"]] = {}

    def names(self, length: int) -> tuple[str, ...]:
        """The segments of the first `length` positions."""
        if self.given is None:
            return ("first", "rest")[: max(1, min(length, 2))]
        names = self.given.names
        return names if length <= self.given.length or GENERATED in names else (*names, GENERATED)

    @property
    def all_names(self) -> tuple[str, ...]:
        """The segments there can be, however long the text grows."""
        return ("first", "rest") if self.given is None else self.names(self.given.length + 1)

    def table(self, length: int, batch: int) -> Int[Tensor, "#batch position"]:
        """The segment of `length` positions and more, one row for all samples or one a sample."""
        table = self._tables.get(batch)
        if table is None or table.shape[1] < length:
            table = self._tables[batch] = self._made(length, batch)
        return table

    def _made(self, length: int, batch: int) -> Tensor:
        if self.given is None:
            segments = Segments.positions(length + SPARE)
        else:
            segments = self.given.extend(max(length, self.given.length) + SPARE, name=GENERATED)
        table = segments.labels.to(self.device, torch.int32)
        if table.ndim == 1:
            return table[None]
        if batch % len(table):
            raise HeadwiseError(f"segments are for {len(table)} samples, but the batch has {batch}.")
        return table if len(table) == 1 else table.repeat_interleave(batch // len(table), 0)
