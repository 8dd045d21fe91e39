"""The fused path of the engine: an `AttentionCall` with its effects becomes a `FusedCall`, its statistics readings.

Readings the kernels don't keep (Map, Propagate, Top(k > 1), and under Reweight all that need single weights) are taken
by `stream.py` beside them. What the kernels can't do at all (masks without a form, position biases, score maps) is
refused by `fusable`, and the engine takes another path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention.call import AttentionCall
from headwise.attention.dense import Values, reading_places
from headwise.attention.effects import Effects
from headwise.attention.fused import reweight, run
from headwise.attention.fused_second import band_mass, first_mass, received
from headwise.attention.fused_types import SEGMENTS, FusedCall, FusedResult, supports
from headwise.attention.places import place_scores
from headwise.attention.readings import (
    RELATIVE_LAGS,
    At,
    Distance,
    Entropy,
    LogSumExp,
    Mass,
    Reading,
    Received,
    Scores,
    SegmentEntropy,
    Top,
    concrete,
)
from headwise.attention.stream import stream
from headwise.models.segments import SAME, window_size

PLACE_ROWS = 2**14
"""Queries whose single places are read at once."""


def fusable(effects: Effects) -> tuple[bool, str]:
    """Whether the kernels can do this call with its effects, and if not, why."""
    call, mask = effects.call, effects.call.mask
    for given, what in (
        (mask.rule, "a mask rule"), (mask.allowed, "a mask matrix"), (mask.added, "an additive mask"),
        (mask.indices, "a list of keys a query"), (call.bias, "a position bias"), (effects.maps, "ScoreMap"),
    ):  # fmt: skip
        if given is not None and given != []:
            return False, f"the fused kernels don't know {what}"
    names = call.labels.names if call.labels is not None else ()
    if len(names) > SEGMENTS and (effects.weighs or any(b.keys is not None for b in effects.biases)):
        return False, f"the fused kernels keep up to {SEGMENTS} segments, this run has {len(names)}"
    for bias in effects.biases:
        one = bias.keys is not None and bias.keys.label is not None
        if bias.queries is not None and not (one and bias.query_label is not None):
            return False, "the fused kernels bias some queries only towards a segment"
        if bias.keys is not None and bias.keys.mask is None:
            return False, "the fused kernels don't bias keys by their distance"
        if bias.keys is not None and bias.keys.label is None and call.batch > 1:
            return False, "the fused kernels bias by segment, or by key in the same way for all samples"
    if len(effects.weighs) > 1:
        return False, "the fused kernels do one Reweight at a time"
    if any(group.label is None for weigh in effects.weighs for group in weigh.groups):
        return False, "the fused kernels reweight segments only"
    return supports(lower(effects, frozenset(), tables=False))


def fused(
    effects: Effects, readings: Sequence[Reading], output: bool
) -> tuple[Float[Tensor, "batch heads query value_dim"] | None, dict[Reading, Values]]:
    """The heads' outputs before Blend and HeadGain, and the values of the readings."""
    call = effects.call
    names = call.labels.names if call.labels is not None else ()
    mine = [r for r in readings if kept(r, effects, names)]
    want = set()
    for reading in mine:
        if isinstance(reading, Mass) and any(n in names for n in concrete(reading.segments, names)):
            want.add("mass")
        for kind, name in ((Entropy, "entropy"), (Distance, "distance"), (Top, "top")):
            want |= {name} if isinstance(reading, kind) else set()
        if isinstance(reading, SegmentEntropy):
            want |= {"mass", "segment_entropy"}
    lowered = lower(effects, frozenset(want))
    result = FusedResult(call.q.new_empty(0))
    if output or mine:
        if effects.weighs:
            result = weighed(effects, lowered)
        else:
            result = run(lowered if output else replace(lowered, v=None))
    values = {reading: value(reading, effects, lowered, result, names) for reading in mine}
    rest = [r for r in readings if r not in values]
    if rest:
        values |= stream(effects, rest, output=False)[1]
    return result.out if output else None, values


def kept(reading: Reading, effects: Effects, names: Sequence[str]) -> bool:
    """Whether the kernels give this reading."""
    if isinstance(reading, Mass):
        segments = concrete(reading.segments, names)
        relative = [n for n in segments if n not in names]
        known = len(names) <= SEGMENTS or len(relative) == len(segments)
        return known and SAME not in relative and not (relative and effects.weighs)
    if isinstance(reading, SegmentEntropy):
        return len(names) <= SEGMENTS and all(n in names for n in concrete(reading.segments, names))
    if isinstance(reading, (At, Received)):
        return not effects.weighs
    if isinstance(reading, Top):
        return reading.k == 1
    return isinstance(reading, (Entropy, Distance, LogSumExp, Scores))


def lower(effects: Effects, want: frozenset[str], tables: bool = True) -> FusedCall:
    """The call as the kernels take it. Positions are counted from the first key."""
    call, mask = effects.call, effects.call.mask
    lowered = FusedCall(
        call.q, call.k, call.v, call.scale, softcap=call.softcap, sinks=call.sinks, key_valid=mask.key_valid, want=want,
    )  # fmt: skip
    if mask.right == 0 and mask.left is None:
        lowered.causal = True
    elif mask.right is not None or mask.left is not None:
        lowered.window = (mask.left, mask.right)
    if not tables:
        return lowered
    lowered.query_offset, lowered.positions = positions(call)
    if call.labels is not None and len(call.labels.names) <= SEGMENTS:
        lowered.key_labels, lowered.segments = call.labels.keys, len(call.labels.names)
    segment_biases(effects, lowered)
    return lowered


def positions(call: AttentionCall) -> tuple[int, Int[Tensor, " query"] | None]:
    """Where the queries start, and all their places where they are not one after the other."""
    first = call.first
    regular = call.last - first + 1 == call.queries
    return first - call.j0, None if regular else (call.i - call.j0).int()


def segment_biases(effects: Effects, lowered: FusedCall) -> None:
    """ScoreBias edits as a table over segments, or where they speak of single keys, a vector over keys."""
    call = effects.call
    labels = call.labels
    for bias in effects.biases:
        label = bias.keys.label if bias.keys is not None else None
        if label is not None and labels is not None:
            rows = len(labels.names) + 1
            if lowered.bias_table is None:
                lowered.bias_table = torch.zeros(call.heads, rows, rows - 1, device=call.q.device)
                lowered.query_labels = torch.where(labels.queries < 0, rows - 1, labels.queries).int()
            chosen = slice(None) if bias.query_label is None else bias.query_label
            lowered.bias_table[:, chosen, label] += one_of(
                bias.heads, call.heads, bias.value, (1,) * (chosen == slice(None))
            )
            continue
        vector = bias.vector
        if vector is None:
            inside = bias.keys.mask[0] if bias.keys is not None and bias.keys.mask is not None else None
            vector = torch.ones(call.keys, device=call.q.device)
            vector = torch.full_like(vector, bias.value) if inside is None else torch.where(inside, bias.value, 0.0)
        else:
            vector = bias.value * vector.float()
        if lowered.key_bias is None:
            lowered.key_bias = torch.zeros(call.heads, call.keys, device=call.q.device)
        lowered.key_bias[bias.heads] += vector


def one_of(heads: Int[Tensor, " chosen"], count: int, value: float, more: tuple[int, ...]) -> Tensor | float:
    """`value` for the chosen heads, 0 for the others."""
    if len(heads) == count:
        return value
    step = torch.zeros(count, *more, device=heads.device)
    step[heads] = value
    return step


def weighed(effects: Effects, lowered: FusedCall) -> FusedResult:
    """Reweight: each group attended by itself, merged with the rule's weights."""
    [weigh] = effects.weighs
    groups = [-1] * lowered.segments
    for number, group in enumerate(weigh.groups):
        assert group.label is not None
        groups[group.label] = number

    def rule(masses: Tensor) -> Tensor:
        factors = torch.ones_like(masses)
        factors[:, weigh.heads] = weigh.edit.weights(masses[:, weigh.heads]).to(factors)
        return factors if weigh.queries is None else torch.where(weigh.queries[:, None, :, None], factors, 1.0)

    return reweight(lowered, groups, rule)[0]


def value(reading: Reading, effects: Effects, lowered: FusedCall, result: FusedResult, names: Sequence[str]) -> Values:
    """One reading's variables, from what the kernels kept."""
    if isinstance(reading, Mass):
        segments = concrete(reading.segments, names)
        return {"mass": torch.stack([mass_of(n, effects.call, lowered, result, names) for n in segments], -1)}
    if isinstance(reading, SegmentEntropy):
        chosen = [names.index(n) for n in concrete(reading.segments, names)]
        return {"segment_entropy": result.segment_entropy[..., chosen]}  # type: ignore[index]
    if isinstance(reading, Entropy):
        return {"entropy": result.entropy}  # type: ignore[dict-item]
    if isinstance(reading, Distance):
        return {"distance": result.distance, "distance_sq": result.distance_sq}  # type: ignore[dict-item]
    if isinstance(reading, LogSumExp):
        return {"lse": result.lse}
    if isinstance(reading, Top):
        index = result.top_index.long()  # type: ignore[union-attr]
        index = torch.where(index >= 0, index + effects.call.j0, -1)
        return {"top_value": result.top_value[..., None], "top_index": index[..., None]}  # type: ignore[index]
    if isinstance(reading, Received):
        valid = effects.call.query_valid
        sums = received(lowered, result.lse, valid)
        seen = visible_queries(effects.call, lowered)
        return {"received": sums, "received_visible": seen[:, None].expand_as(sums)}
    assert isinstance(reading, (At, Scores))
    return places(reading, effects, result)


def mass_of(name: str, call: AttentionCall, lowered: FusedCall, result: FusedResult, names: Sequence[str]) -> Tensor:
    if name in names:
        return result.mass[..., names.index(name)]  # type: ignore[index]
    if name == "first":
        return first_mass(lowered, result.lse) if call.j0 == 0 else torch.zeros_like(result.lse)
    width = window_size(name)
    low, high = (RELATIVE_LAGS[name],) * 2 if width is None else (-width, width)
    return band_mass(lowered, low, high, result.lse)


def visible_queries(call: AttentionCall, lowered: FusedCall) -> Float[Tensor, "batch key"]:
    """How many valid queries the mask lets see each key, by counting queries up to a position."""
    valid = call.valid()
    span = call.last - call.j0 + 1
    at = torch.zeros(call.batch, max(span, 1) + 1, device=call.q.device)
    place = (call.i - call.j0).clamp(min=-1) + 1
    at.index_add_(1, place, valid.to(at.dtype))
    upto = torch.nn.functional.pad(at.cumsum(1), (1, 0))
    left, right = lowered.bounds
    j = torch.arange(call.keys, device=call.q.device)
    # upto[:, n] counts queries at positions below n - 1; those before the first key are all counted at -1.
    low = torch.zeros_like(j) if right is None else (j - right + 1).clamp(0, upto.shape[1] - 1)
    high = torch.full_like(j, upto.shape[1] - 1) if left is None else (j + left + 2).clamp(0, upto.shape[1] - 1)
    seen = (upto[:, high] - upto[:, low]).clamp(min=0)
    return seen if lowered.key_valid is None else seen * lowered.key_valid


def places(reading: At | Scores, effects: Effects, result: FusedResult) -> Values:
    """Weights or scores at single places, from the known log-sum-exp."""
    rows, columns, there = reading_places(reading, effects.call)
    found = []
    for start in range(0, max(len(rows), 1), PLACE_ROWS):
        part = slice(start, start + PLACE_ROWS)
        s = place_scores(effects, rows[part], columns[:, part], [], torch.float32)
        exists = there[:, None, part]
        if isinstance(reading, At):
            lse = result.lse[:, :, rows[part], None].nan_to_num(neginf=0.0)
            found.append(torch.where(exists, torch.exp(s - lse), 0.0))
        else:
            found.append(torch.where(exists & ~torch.isneginf(s), s, float("nan")))
    picked = torch.cat(found, 2)
    return {reading.variables[0]: picked[..., 0] if reading.kind == "pair" else picked}
