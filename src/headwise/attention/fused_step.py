"""Attention of one new token a sample on the GPU, with ScoreBias, Reweight and HeadGain as small tables.

The tables speak of heads and segments, so they hold for every token to come: the segment of a key is looked up in the
kernels (`fused_step_kernels.py`). Edits they can't express make `fused_step` answer None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from headwise.attention.call import AttentionCall
from headwise.attention.edits import Edit, HeadGain, Reweight, ScoreBias
from headwise.attention.fused import LOG2E, multiprocessors
from headwise.attention.fused_step_kernels import step_merge, step_split
from headwise.attention.incoming import Seen
from headwise.attention.label_table import LabelTable
from headwise.attention.scratch import Scratch

MOST_ROWS = 64
"""Rows of one program: heads that share keys, times groups."""
MOST_ENTRIES = 2**22
"""Entries of a table."""
SPLIT_KEYS = 128
"""Keys a program should at least have."""
data_ptr = Tensor.data_ptr


class Launch:
    """A kernel launched again and again with arguments of the same kinds.

    Triton looks at every argument of a launch to find the code compiled for its kind, and at its settings; that takes
    several times as long as the launch itself. Here only the first one does, and addresses go to the driver as numbers:
    it asks about tensors. So all numbers of the kernel must be `do_not_specialize`, and pointers stay multiples of 16
    bytes, or are `do_not_specialize_on_alignment`.
    """

    def __init__(self, kernel: Any, options: dict[str, int], **constants: Any):
        self.kernel, self.settings = kernel, constants | options
        self.constants = tuple(constants.values())
        self.launch: Any = None
        self.code: tuple[Any, ...] = ()

    def bind(self, *fixed: Any) -> None:
        """The arguments that stay the same, after those that change. Only tensors of our own: nobody else gives them
        other memory, and they live as long as their addresses are used."""
        self.fixed = fixed
        self.tail = *(x.data_ptr() if isinstance(x, Tensor) else x for x in fixed), *self.constants

    def __call__(
        self, grid: tuple[int, int, int], stream: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]
    ) -> None:
        if self.launch is not None:
            self.launch(*grid, stream, *self.code, *map(data_ptr, tensors), *numbers, *self.tail)
            return
        compiled = self.kernel[grid](*tensors, *numbers, *self.fixed, **self.settings)
        # In Triton's interpreter nothing is compiled, and every launch goes the long way.
        if compiled is not None:
            # The three that are None: metadata and hooks for profilers of Triton's own.
            self.code = (compiled.function, compiled.packed_metadata, None, None, None)
            self.launch = compiled.run


@dataclass
class Tables:
    """What the edits of a site come to, on the CPU."""

    heads: int
    segments: int
    bias: Float[Tensor, "heads query_segment segment"] | None = None
    gain: Float[Tensor, "heads query_segment"] | None = None
    rule: Reweight | None = None
    chosen: tuple[int, ...] = ()
    """The heads of `rule`."""
    weighed_label: int | None = None
    """The segment of the queries `rule` is for; None for all."""

    def put(self, edit: Edit, heads: list[int], names: Sequence[str]) -> bool:
        """Takes an edit in; False where a table can't say it."""
        queries = edit.tokens if isinstance(edit, HeadGain) else getattr(edit, "queries", None)
        if queries is not None and queries not in names:
            return False
        rows = slice(None) if queries is None else slice(names.index(queries), names.index(queries) + 1)
        if isinstance(edit, ScoreBias):
            if edit.keys is not None and (not isinstance(edit.keys, str) or edit.keys not in names):
                return False
            if self.bias is None:
                self.bias = torch.zeros(self.heads, self.segments, self.segments)
            columns = slice(None) if edit.keys is None else names.index(edit.keys)
            self.bias[heads, rows, columns] += float(edit.value) * LOG2E
            return True
        if isinstance(edit, HeadGain):
            if not isinstance(edit.gain, (int, float)):
                return False
            if self.gain is None:
                self.gain = torch.ones(self.heads, self.segments)
            self.gain[heads, rows] *= float(edit.gain)
            return True
        if not isinstance(edit, Reweight) or self.rule is not None or any(g not in names for g in edit.groups):
            return False
        self.rule, self.chosen = edit, tuple(heads)
        self.weighed_label = None if queries is None else names.index(queries)
        return True


def fused_step(
    call: AttentionCall, edits: Sequence[tuple[Edit, list[int]]], known: LabelTable, scratch: Scratch
) -> FusedStep | None:
    """A step for calls like this one; None where its edits are no tables."""
    names = known.all_names
    tables = Tables(call.heads, len(names))
    if call.heads * len(names) ** 2 > MOST_ENTRIES or max(call.q.shape[-1], call.v.shape[-1]) > 256:
        return None
    if call.q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or call.bias is not None:
        return None
    if not all(tables.put(edit, heads, names) for edit, heads in edits):
        return None
    groups = len(tables.rule.groups) if tables.rule is not None else 0
    if call.group * (groups + 1) > MOST_ROWS:
        return None
    return FusedStep(call, tables, groups, known, scratch)


def no_stream(index: int | None) -> int:
    """A CPU has none: Triton's interpreter."""
    return 0


class FusedStep:
    """The tables on the device, and the launches."""

    def __init__(self, call: AttentionCall, tables: Tables, groups: int, known: LabelTable, scratch: Scratch):
        device, names = call.q.device, known.all_names
        flag = self.flag = scratch.flag(device)
        self.known, self.scratch, self.tables, self.groups, self.device = known, scratch, tables, groups, device
        self.batch, self.heads, _, self.dim = call.q.shape
        self.kv_heads, self.value_dim, self.exact = call.k.shape[1], call.v.shape[-1], call.q.dtype == torch.float32
        self.scale = call.scale if call.softcap is not None else call.scale * LOG2E
        self.has_softcap, self.softcap = call.softcap is not None, call.softcap or 1.0
        self.has_sinks, self.sinks = call.sinks is not None, flag if call.sinks is None else call.sinks
        self.rule, self.chosen, self.segments = tables.rule, len(tables.chosen), tables.segments
        self.weighed_label = -1 if tables.weighed_label is None else tables.weighed_label
        part_of, slot = torch.full((len(names),), groups), torch.full((call.heads,), -1)
        if tables.rule is not None:
            part_of[[names.index(g) for g in tables.rule.groups]] = torch.arange(groups)
            slot[list(tables.chosen)] = torch.arange(len(tables.chosen))
        self.part_of, self.slot = part_of.int().to(device), slot.int().to(device)
        self.bias = flag if tables.bias is None else tables.bias.to(device)
        self.gain = flag if tables.gain is None else tables.gain.to(device)
        programs = 2 * multiprocessors(device) // (self.batch * self.kv_heads)
        self.most = max(1, min(programs, 64))
        self.lanes = self.batch * self.kv_heads
        self.size = self.batch * self.heads * self.most * (groups + 1) * (self.value_dim + 1)
        self.like_out = torch.empty(self.batch, 1, self.heads, self.value_dim, dtype=call.q.dtype, device=device)
        self.like_masses = torch.empty(self.batch, self.chosen, 1, groups, device=device)
        self.index, self.stream, self.reach = device.index, -1, 0
        self.several = device.type == "cuda" and torch.cuda.device_count() > 1
        self.current_stream = triton.runtime.driver.active.get_current_stream if device.type == "cuda" else no_stream
        self.launches: dict[tuple[bool, bool, bool], tuple[Launch, Launch]] = {}

    def run(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor | None:
        """[batch, 1, heads, value_dim]; None where the tensors lie in memory in a way the kernels don't know.

        The host is what decoding waits for: what can be known before is no work here.
        """
        if self.several and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                return self.run(q, k, v, seen)
        position, j0, left, right, valid = seen
        keys = k.shape[2]
        (qb, qh, _, qd), (kb, kh, kk, kd), (vb, vh, vk, vd) = q.stride(), k.stride(), v.stride()
        if (qb | qh | kb | kh | kk | vb | vh | vk) % 8 or qd * kd * vd != 1:
            return None
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            return None
        if valid is not None and valid.shape != (self.batch, keys):
            return None
        last, stream = j0 + (keys if keys > position else position + 1), self.current_stream(self.index)
        if last > self.reach or stream != self.stream:
            self.settle(last, stream)
        kind = (left is None, right is None, valid is None)
        split, merge = self.launches.get(kind) or self.prepare(kind)
        splits, out, rule = min(self.most, -(-keys // SPLIT_KEYS)), torch.empty_like(self.like_out), self.rule
        masses = factors = self.flag if rule is None else torch.empty_like(self.like_masses)
        split(
            (splits, self.lanes, 1), stream, (q, k, v, self.sinks, self.flag if valid is None else valid, masses),
            (qb // 8, qh // 8, kb // 8, kh // 8, kk // 8, vb // 8, vh // 8, vk // 8, keys, position, j0, left or 0,
             right or 0),
        )  # fmt: skip
        if rule is not None:
            factors = rule.factors(masses)
            if factors.dtype is not torch.float32 or factors.device != self.device or not factors.is_contiguous():
                factors = factors.to(masses).contiguous()
        merge((self.heads, self.batch, 1), stream, (self.sinks, factors, out), (splits, j0 + position))
        return out

    def settle(self, length: int, stream: int) -> None:
        """Labels for so many positions and more, and room on this stream."""
        self.stream, self.labels = stream, self.known.table(length, self.batch)
        self.reach = self.labels.shape[1]
        self.room, self.done = self.scratch.room(self.device, stream, self.size, self.lanes)
        for split, merge in self.launches.values():
            self.bind(split, merge)

    def bind(self, split: Launch, merge: Launch) -> None:
        """All that is the same for every layer and token."""
        segments, label_stride = self.segments, self.reach if self.labels.shape[0] > 1 else 0
        split.bind(
            self.room, self.labels, self.bias, self.part_of, self.slot, self.done, self.chosen, label_stride,
            segments * segments, segments, self.scale, self.softcap,
        )  # fmt: skip
        merge.bind(
            self.room, self.slot, self.gain, self.labels, self.flag, self.chosen, label_stride, segments,
            self.weighed_label,
        )  # fmt: skip

    def prepare(self, without: tuple[bool, bool, bool]) -> tuple[Launch, Launch]:
        """The two launches for masks without a left bound, a right bound, padding."""
        group, parts = self.heads // self.kv_heads, self.groups + 1
        wide = triton.next_power_of_2(max(16, self.dim)), triton.next_power_of_2(max(16, self.value_dim))
        stretches = max(2, triton.next_power_of_2(self.most * parts))
        narrow = self.exact or max(wide) > 128
        # What tables say of a key is read after its segment: a longer way, so more tiles must be under way.
        stages = (2 if narrow else 3) + (2 if self.tables.bias is not None or parts > 1 else 0)
        split = Launch(
            step_split, {"num_warps": 4, "num_stages": stages}, KV=self.kv_heads, GROUP=group, PARTS=parts,
            HAS_LEFT=not without[0], HAS_RIGHT=not without[1], HAS_VALID=not without[2],
            HAS_BIAS=self.tables.bias is not None, HAS_SINKS=self.has_sinks, SOFTCAP=self.has_softcap,
            EXACT=self.exact, D=self.dim, DP=wide[0], DV=self.value_dim, DVP=wide[1],
            BM=triton.next_power_of_2(max(16, group * parts)), BN=32 if narrow else 64,
            GP=triton.next_power_of_2(group), SP=stretches,
        )  # fmt: skip
        merge = Launch(
            step_merge, {"num_warps": 8}, H=self.heads, PARTS=parts, HAS_SINKS=self.has_sinks,
            HAS_GAIN=self.tables.gain is not None, ONE_LABEL=self.tables.weighed_label is not None, DV=self.value_dim,
            DVP=wide[1], SP=stretches, BR=min(128, stretches),
        )  # fmt: skip
        self.bind(split, merge)
        self.launches[without] = split, merge
        return split, merge
