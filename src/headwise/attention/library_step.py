"""Decoding without a GPU: edits that come to a bias over keys and a gain of heads, in PyTorch's own attention.

What a token's bias is depends on the segment of the token only, so a row of it for every position is made once and cut
to the keys there are. Layers with the same edits share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.attention.call import AttentionCall
from headwise.attention.edits import Edit, HeadGain, ScoreBias
from headwise.attention.incoming import Seen
from headwise.attention.label_table import LabelTable

FIRST = "first"
"""Position 0, where no segment has that name."""
NOBODY = -2
"""A label that no token has: what no token after a cache can be."""


@dataclass
class Row:
    """What the edits are to queries of some segments: the bias of every position, the keys they take away, and the gain
    of every head."""

    bias: Float[Tensor, "#batch heads 1 position"] | None
    cut: Bool[Tensor, "#batch heads 1 position"] | None
    gain: Float[Tensor, "#batch 1 heads 1"] | None


@dataclass
class Token:
    """What all layers of a forward that share a step need of the token under way."""

    seen: Seen
    keys: int
    mask: Tensor | None
    empty: Bool[Tensor, "#batch 1 #heads 1"] | None
    """Heads that see no key."""
    gain: Tensor | None


@dataclass
class LibraryStep:
    """The output [batch, 1, heads, value_dim] of one token."""

    edits: Sequence[tuple[Edit, list[int]]]
    known: LabelTable
    scale: float
    grouped: bool
    rows: dict[tuple, Row] = field(default_factory=dict)
    token: Token | None = None

    def run(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        token = self.token
        if token is None or token.seen is not seen or token.keys != k.shape[2]:
            token = self.token = self.next(q, k.shape[2], seen)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=token.mask, scale=self.scale, enable_gqa=self.grouped
        )
        out = out.transpose(1, 2)
        if token.empty is not None:
            out = out.masked_fill(token.empty, 0.0)
        return out.contiguous() if token.gain is None else out * token.gain

    def next(self, q: Tensor, keys: int, seen: Seen) -> Token:
        """The row of the token's segment, cut to the keys there are."""
        position = seen.j0 + seen.position
        table = self.known.table(max(seen.j0 + keys, position + 1), len(q))
        key = (*table[:, position].tolist(), table.shape[1])
        if key not in self.rows:
            self.rows[key] = made(self.edits, self.known.all_names, table, table[:, position], q)
        row, here = self.rows[key], slice(seen.j0, seen.j0 + keys)
        mask = None if row.bias is None else row.bias[..., here]
        hidden = unseen(seen, keys) + ([] if row.cut is None else [row.cut[..., here]])
        if not hidden:
            return Token(seen, keys, mask, None, row.gain)
        together = reduce(torch.logical_or, hidden)
        mask = q.new_zeros(1, 1, 1, keys) if mask is None else mask
        empty = None if row.cut is None else together.all(-1, keepdim=True).transpose(1, 2)
        return Token(seen, keys, mask.masked_fill(together, torch.finfo(q.dtype).min), empty, row.gain)


def made(
    edits: Sequence[tuple[Edit, list[int]]],
    names: Sequence[str],
    table: Int[Tensor, "#batch position"],
    label: Int[Tensor, " #batch"],
    q: Tensor,
) -> Row:
    """The edits as numbers, for queries of these labels."""
    heads, low = q.shape[1], torch.finfo(q.dtype).min / 4
    bias = cut = gain = None
    for edit, chosen in edits:
        name = edit.tokens if isinstance(edit, HeadGain) else getattr(edit, "queries", None)
        meant = label == (names.index(name) if name in names else NOBODY)
        meant = torch.ones_like(meant) if name is None else meant
        if isinstance(edit, HeadGain):
            gain = q.new_ones(len(label), 1, heads, 1) if gain is None else gain
            gain[:, :, chosen] *= q.new_ones(()).where(~meant, edit.gain)[:, None, None, None]  # type: ignore[arg-type]
        elif isinstance(edit, ScoreBias):
            step = q.new_full(table.shape, edit.value)
            if isinstance(edit.keys, Tensor):
                given = edit.keys.to(q.device)
                given = q.new_zeros(()).where(~given, edit.value) if given.dtype == torch.bool else edit.value * given
                step.zero_()[:, : len(given)] = given
            elif edit.keys in names:
                step = step.where(table == names.index(edit.keys), 0.0)
            elif edit.keys == FIRST:
                step[:, 1:] = 0
            step = step.where(meant[:, None], 0.0)[:, None, None]
            bias = q.new_zeros(len(label), heads, 1, table.shape[1]) if bias is None else bias
            bias[:, chosen] += step.clamp(min=low)
            if edit.cuts:
                cut = torch.zeros_like(bias, dtype=torch.bool) if cut is None else cut
                cut[:, chosen] |= step == -torch.inf
    return Row(bias, cut, gain)


def unseen(seen: Seen, keys: int) -> list[Bool[Tensor, "..."]]:
    """The keys that padding and the mask's bounds hide, where they hide any."""
    hidden = [] if seen.valid is None else [seen.valid.view(torch.bool).logical_not()[:, None, None]]
    gap = seen.position - torch.arange(keys)
    if seen.right is not None and keys > seen.position + seen.right + 1:
        hidden.append(gap < -seen.right)
    if seen.left is not None and seen.position > seen.left:
        hidden.append(gap > seen.left)
    return hidden


def sayable(edit: Edit, names: Sequence[str]) -> bool:
    """Whether a row of biases and gains says all of an edit."""
    if isinstance(edit, HeadGain):
        return isinstance(edit.gain, int | float) and (edit.tokens is None or edit.tokens in (*names, FIRST))
    if not isinstance(edit, ScoreBias):
        return False
    vector = isinstance(edit.keys, Tensor) and edit.keys.ndim == 1
    named = vector or edit.keys is None or (isinstance(edit.keys, str) and edit.keys in (*names, FIRST))
    return named and (edit.queries is None or edit.queries in (*names, FIRST))


def library_step(call: AttentionCall, edits: Sequence[tuple[Edit, list[int]]], known: LabelTable) -> LibraryStep | None:
    """The step for calls like this one; None where a row of biases and gains does not say all of it."""
    plain = all(x is None for x in (call.softcap, call.sinks, call.bias, call.form))
    if call.q.is_cuda or not plain or not all(sayable(edit, known.all_names) for edit, _ in edits):
        return None
    return LibraryStep(edits, known, call.scale, call.group > 1)
