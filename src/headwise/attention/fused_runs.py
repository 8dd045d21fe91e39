"""Segment labels as runs: stretches of keys with one label, which is how most texts are labelled.

The Hopper kernel walks runs instead of labels. The table depends on the labels only, so it is made once for a tensor of
labels and found again by every layer of a forward pass.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from headwise.attention.once import once

SEGMENTS = 32
MANY = 1 << 8
"""Set in a run's label when the label occurs in more than one run: its mass is then merged, not stored."""


@dataclass(frozen=True, eq=False)
class Runs:
    """table [batch, run, 2]: first key and label of every run; of_tile [batch, tile]: the run of a tile's last key."""

    table: Int[Tensor, "batch run two"]
    of_tile: Int[Tensor, "batch tile"]
    slots: int
    """Masses to keep: the segments, and one more when some keys have no label."""

    @property
    def count(self) -> int:
        return self.table.shape[1]


def runs_of(labels: Int[Tensor, "batch key"], segments: int, tile: int) -> Runs:
    """The run table of these labels (negative: no segment), for key tiles of this size."""
    return once(labels, "runs", _table, segments, tile)


def _table(labels: Tensor, segments: int, tile: int) -> Runs:
    batch, keys = labels.shape
    labels = labels.long()
    slots = segments + int(bool((labels < 0).any()))
    labels = torch.where(labels < 0, segments, labels)
    begins = torch.ones_like(labels, dtype=torch.bool)
    begins[:, 1:] = labels[:, 1:] != labels[:, :-1]
    number = begins.cumsum(1) - 1
    table = labels.new_zeros(batch, int(number[:, -1].max()) + 1, 2)
    sample, first = begins.nonzero(as_tuple=True)
    run, label = number[sample, first], labels[sample, first]
    times = labels.new_zeros(batch, slots)
    times.index_put_((sample, label), torch.ones_like(label), accumulate=True)
    table[sample, run, 0] = first
    table[sample, run, 1] = label + MANY * (times[sample, label] > 1)
    ends = torch.arange(tile, keys + tile, tile, device=labels.device).clamp(max=keys) - 1
    return Runs(table.int().contiguous(), number[:, ends].int().contiguous(), slots)


def group_tiles(labels: Int[Tensor, "batch key"], tile: int, groups: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """For every sample and group (labels as bits; bit SEGMENTS: no label), the key tiles that hold keys of it, and how
    many such tiles come before each tile: [batch, group, tile] and [batch, group, tile + 1]."""
    return once(labels, "tiles", _group_tiles, tile, *groups)


def _group_tiles(labels: Tensor, tile: int, *groups: int) -> tuple[Tensor, Tensor]:
    keys = labels.shape[1]
    tiles = -(-keys // tile)
    place = torch.where(labels < 0, SEGMENTS, labels.long())
    groups_of = torch.tensor(groups, device=labels.device)[None, :, None]
    member = ((groups_of >> place[:, None]) & 1).bool()
    member = torch.nn.functional.pad(member, (0, tiles * tile - keys))
    busy = member.unflatten(-1, (tiles, tile)).any(-1).int()
    before = torch.nn.functional.pad(busy.cumsum(-1), (1, 0)).int().contiguous()
    return busy.argsort(dim=-1, descending=True, stable=True).int().contiguous(), before
