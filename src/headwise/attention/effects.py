"""Edits made concrete for one call: names become masks over its keys and queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.attention.call import AttentionCall, expand_kv
from headwise.attention.edits import (
    OTHERS,
    Blend,
    Edit,
    HeadGain,
    KeyRule,
    Rebase,
    Reweight,
    ScoreBias,
    ScoreMap,
    Shift,
)
from headwise.attention.once import numbers, on
from headwise.attention.readings import RELATIVE_LAGS
from headwise.attention.rope import rebase
from headwise.errors import HeadwiseError
from headwise.models.segments import SAME, window_size


@dataclass(frozen=True)
class KeySet:
    """Some of a call's keys: a segment, any set, or the gaps i - j that count (relative segments)."""

    given: Bool[Tensor, "#batch key"] | None = None
    gap: tuple[int, int] | None = None
    label: int | None = None
    """Which of the call's segments this is, where it is one: the fused kernels work with labels, not masks."""
    labels: Int[Tensor, "#batch key"] | None = None
    """The segment of every key."""
    same: bool = False
    """The keys of the query's own segment."""
    rule: KeyRule | None = None
    batch: int = 1

    @cached_property
    def mask(self) -> Bool[Tensor, "#batch key"] | None:
        """Which keys these are; None where that depends on the query."""
        return self.given if self.labels is None or self.label is None else self.labels.eq(self.label)

    def block(self, i: Int[Tensor, " row"], j0: int, start: int, stop: int) -> Bool[Tensor, "#batch one #row column"]:
        if self.rule is not None:
            b, j = torch.arange(self.batch, device=i.device), torch.arange(start, stop, device=i.device) + j0
            chosen = self._asked(b[:, None, None, None], i[:, None], j)
            return chosen.expand(chosen.shape[0], 1, len(i), stop - start)
        if self.same:
            assert self.labels is not None
            columns = self.labels[:, start:stop]
            # A tile may reach past the last key.
            columns = torch.nn.functional.pad(columns, (0, stop - start - columns.shape[1]), value=-1)
            return (self.labels[:, i - j0, None] == columns[:, None])[:, None]
        if self.gap is None:
            assert self.mask is not None
            return self.mask[:, None, None, start:stop]
        gap = i[:, None] - (torch.arange(start, stop, device=i.device) + j0)[None]
        return ((gap >= self.gap[0]) & (gap <= self.gap[1]))[None, None]

    def at(self, i: Int[Tensor, " row"], j0: int, j: Int[Tensor, "batch row place"]) -> Bool[Tensor, "batch row place"]:
        if self.rule is not None:
            b = torch.arange(len(j), device=i.device)
            return self._asked(b[:, None, None, None], i[None, :, None], (j + j0)[:, None])[:, 0].expand(j.shape)
        if self.same:
            assert self.labels is not None
            labels = self.labels.expand(j.shape[0], -1)
            return labels[:, i - j0, None] == labels.gather(1, j.flatten(1)).view(j.shape)
        if self.gap is None:
            assert self.mask is not None
            return self.mask.expand(j.shape[0], -1).gather(1, j.flatten(1)).view(j.shape)
        gap = i[None, :, None] - (j + j0)
        return (gap >= self.gap[0]) & (gap <= self.gap[1])

    def _asked(self, b: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, "#batch one #row #place"]:
        assert self.rule is not None
        zero = torch.zeros((), dtype=torch.long, device=i.device)
        chosen = torch.as_tensor(self.rule(b, zero, i, j), device=i.device)
        if chosen.dtype != torch.bool:
            raise HeadwiseError(f"ScoreBias(keys=...): the rule must answer with bools; got {chosen.dtype}.")
        return chosen.reshape((1,) * (4 - chosen.ndim) + chosen.shape)


def key_set(call: AttentionCall, name: str) -> KeySet:
    """The keys a segment name means in this call."""
    if call.labels is not None and name in call.labels.names:
        label = call.labels.names.index(name)
        return KeySet(label=label, labels=call.labels.keys)
    if name == "first":
        return KeySet(given=(torch.arange(call.keys, device=call.q.device) + call.j0 == 0)[None])
    if name in RELATIVE_LAGS:
        return KeySet(gap=(RELATIVE_LAGS[name],) * 2)
    width = window_size(name)
    if width is not None:
        return KeySet(gap=(-width, width))
    if name == SAME and call.labels is not None:
        if call.first < call.j0 or call.last >= call.j0 + call.keys:
            raise HeadwiseError(f'"{SAME}" needs self-attention; {call.site and call.site.name} attends elsewhere.')
        return KeySet(labels=call.labels.keys, same=True)
    known = ", ".join(call.labels.names) if call.labels is not None else "none"
    raise HeadwiseError(f"There is no segment {name!r} in this run: its segments are {known}.")


def key_groups(call: AttentionCall, edit: Reweight) -> list[KeySet]:
    """The groups of a Reweight, in the order given."""
    named = {n: given(call, g) for n, g in enumerate(edit.groups) if isinstance(g, Tensor) or g != OTHERS}
    rest = torch.ones(1, call.keys, dtype=torch.bool, device=call.q.device)
    if OTHERS in [g for g in edit.groups if isinstance(g, str)]:
        for group in named.values():
            assert group.mask is not None
            rest = rest & ~group.mask
    return [named.get(n, KeySet(given=rest)) for n in range(len(edit.groups))]


def given(call: AttentionCall, group: str | Tensor, argument: str = "Reweight(groups=...)") -> KeySet:
    """A group by name, or by bools over positions: keys past their end (generated later) are not in it."""
    if isinstance(group, str):
        return key_set(call, group)
    chosen = on(group, call.q.device)
    chosen = chosen[None] if chosen.ndim == 1 else chosen
    length, rows = call.j0 + call.keys, len(chosen)
    if chosen.shape[1] > length:
        raise HeadwiseError(f"{argument} has {chosen.shape[1]} entries, but the text has {length} tokens.")
    if call.batch % rows:
        raise HeadwiseError(f"{argument} is for {rows} samples, but the batch has {call.batch}.")
    if rows > 1:
        chosen = chosen.repeat_interleave(call.batch // rows, 0)
    full = torch.nn.functional.pad(chosen, (0, length - chosen.shape[1]))
    return KeySet(given=full[:, call.j0 :])


def query_mask(call: AttentionCall, name: str | None) -> Bool[Tensor, "#batch query"] | None:
    """The queries a segment name means; None = all."""
    if name is None:
        return None
    if name == "first":
        return (call.i == 0)[None]
    if call.labels is None or name not in call.labels.names:
        known = ", ".join(call.labels.names) if call.labels is not None else "none"
        raise HeadwiseError(f"There is no segment {name!r} in this run: its segments are {known}.")
    return call.labels.queries == call.labels.names.index(name)


@dataclass(frozen=True)
class Bias:
    """`s += value * keys` for some heads and queries. `vector` over keys, or a set of keys times a value."""

    heads: Int[Tensor, " chosen"]
    value: float
    keys: KeySet | None
    vector: Float[Tensor, " key"] | None
    queries: Bool[Tensor, "#batch query"] | None
    query_label: int | None = None
    cuts: bool = False
    """Whether it takes keys away altogether."""


@dataclass(frozen=True)
class Map_:
    fn: Callable[..., Tensor]
    heads: Int[Tensor, " chosen"]
    keys: KeySet | None
    queries: Bool[Tensor, "#batch query"] | None
    placed: bool = False

    def __call__(self, s: Tensor, i: Int[Tensor, "*#row"], j: Int[Tensor, "*#column"]) -> Tensor:
        """The scores of queries and keys at these positions, mapped."""
        return self.fn(s, i, j) if self.placed else self.fn(s)


@dataclass(frozen=True)
class Weigh:
    edit: Reweight
    heads: Int[Tensor, " chosen"]
    groups: list[KeySet]
    queries: Bool[Tensor, "#batch query"] | None


@dataclass
class Effects:
    """All edits of one call, in the order they apply. `call` has Shift and Rebase in it already."""

    call: AttentionCall
    maps: list[Map_] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    weighs: list[Weigh] = field(default_factory=list)
    outputs: list[tuple[Blend | HeadGain, Int[Tensor, " chosen"]]] = field(default_factory=list)

    @property
    def changes_scores(self) -> bool:
        return bool(self.maps or self.biases or self.weighs)

    def select(self, call: AttentionCall, rows: Tensor | None, heads: list[int] | None) -> Effects:
        """The same effects for a call that holds some rows and heads of this one's."""

        def fewer(effect):
            queries = effect.queries
            if queries is not None and rows is not None:
                queries = queries[:, on(rows, queries.device)]
            chosen = effect.heads
            if heads is not None:
                places = [heads.index(h) for h in chosen.tolist() if h in heads]
                chosen = numbers(tuple(places), chosen.device)
            return replace(effect, queries=queries, heads=chosen)

        picked = [[fewer(e) for e in kind] for kind in (self.maps, self.biases, self.weighs)]
        return Effects(call, *([e for e in kind if len(e.heads)] for kind in picked))


def resolve(call: AttentionCall, edits: Sequence[tuple[Edit, list[int]]]) -> Effects:
    """Edits with the heads they are for, made concrete for this call."""
    device = call.q.device
    for edit, heads in edits:
        if isinstance(edit, Shift):
            call = shifted(call, edit, heads)
    for edit, heads in edits:
        if isinstance(edit, Rebase):
            call = rebase(call, edit, heads)
    effects = Effects(call)
    for edit, heads in edits:
        index = numbers(tuple(heads), device)
        if isinstance(edit, ScoreMap):
            keys = None if edit.keys is None else key_set(call, edit.keys)
            effects.maps.append(Map_(edit.fn, index, keys, query_mask(call, edit.queries), edit.placed))
        elif isinstance(edit, ScoreBias):
            effects.biases.append(_bias(call, edit, index))
        elif isinstance(edit, Reweight):
            groups = key_groups(call, edit)
            effects.weighs.append(Weigh(edit, index, groups, query_mask(call, edit.queries)))
        elif isinstance(edit, (Blend, HeadGain)):
            effects.outputs.append((edit, index))
    effects.outputs.sort(key=lambda pair: isinstance(pair[0], HeadGain))
    return effects


def _bias(call: AttentionCall, edit: ScoreBias, index: Tensor) -> Bias:
    vector, keys = None, None
    if isinstance(edit.keys, Tensor) and edit.keys.dtype == torch.bool:
        keys = given(call, edit.keys, "ScoreBias(keys=...)")
    elif isinstance(edit.keys, Tensor):
        vector = on(edit.keys, call.q.device)
        if call.j0 or len(vector) != call.keys:
            # The vector speaks of positions: keys past its end (generated later) get no bias.
            length = call.j0 + call.keys
            if len(vector) > length:
                raise HeadwiseError(f"ScoreBias(keys=...) has {len(vector)} entries, but the text has {length} tokens.")
            vector = torch.cat([vector, vector.new_zeros(length - len(vector))])[call.j0 :]
    elif isinstance(edit.keys, str):
        keys = key_set(call, edit.keys)
    elif edit.keys is not None:
        keys = KeySet(rule=edit.keys, batch=call.batch)
    names = call.labels.names if call.labels is not None else ()
    label = names.index(edit.queries) if edit.queries in names else None
    return Bias(index, float(edit.value), keys, vector, query_mask(call, edit.queries), label, edit.cuts)


def shifted(call: AttentionCall, edit: Shift, heads: list[int]) -> AttentionCall:
    index = numbers(tuple(heads), call.q.device)

    def moved(x: Tensor, d: Tensor, tokens: Tensor | None, what: str) -> Tensor:
        if d.shape[-1] != x.shape[-1] or d.ndim > 2 or (d.ndim == 2 and len(d) != len(heads)):
            raise HeadwiseError(
                f"Shift({what}=...) must have shape [{x.shape[-1]}] or [{len(heads)}, {x.shape[-1]}]; "
                f"got {tuple(d.shape)}."
            )
        step = d.to(x).expand(len(heads), -1)[None, :, None]
        if tokens is not None:
            step = step * tokens[:, None, :, None]
        x = x.clone()
        x[:, index] = x[:, index] + step
        return x

    if edit.q is not None:
        call = replace(call, q=moved(call.q, edit.q, query_mask(call, edit.tokens), "q"))
    if edit.k is not None:
        call = expand_kv(call)
        tokens = None if edit.tokens is None else key_set(call, edit.tokens).mask
        call = replace(call, k=moved(call.k, edit.k, tokens, "k"))
    return call


def finish(
    effects: Effects,
    out: Float[Tensor, "batch heads query value_dim"],
    uniform: Callable[[AttentionCall], Tensor],
) -> Float[Tensor, "batch heads query value_dim"]:
    """Blend and HeadGain on the heads' outputs. `uniform(call)` attends with equal weights to all keys seen."""
    call = effects.call
    for edit, index in effects.outputs:
        out = out.clone()
        if isinstance(edit, Blend):
            new = _blended(edit, out[:, index], _target(call, edit, index, uniform).to(out))
        else:
            new = _gained(call, edit, out[:, index])
        tokens = query_mask(call, edit.tokens)
        out[:, index] = new if tokens is None else torch.where(tokens[:, None, :, None], new, out[:, index])
    return out


def _blended(edit: Blend, z: Tensor, target: Tensor) -> Tensor:
    alpha: float | Tensor = edit.alpha
    if isinstance(alpha, Tensor):
        if alpha.shape != z.shape[1:2]:
            raise HeadwiseError(f"Blend(alpha=...) must be one number for each of {z.shape[1]} heads.")
        alpha = alpha.to(z)[None, :, None, None]
    return (1 - alpha) * z + alpha * target


def _target(call: AttentionCall, edit: Blend, index: Tensor, uniform: Callable[[AttentionCall], Tensor]) -> Tensor:
    if isinstance(edit.target, Tensor):
        if edit.target.shape != (len(index), call.v.shape[-1]):
            raise HeadwiseError(
                f"Blend(target=...) must be [{len(index)}, {call.v.shape[-1]}]; got {tuple(edit.target.shape)}."
            )
        return edit.target[None, :, None]
    part = call.select(heads=index.tolist())
    if edit.target == "uniform":
        return uniform(part)
    if edit.target == "mean":
        valid = call.mask.key_valid
        if valid is None:
            return part.v.mean(2, keepdim=True)
        share = (valid / valid.sum(1, keepdim=True).clamp(min=1)).to(part.v)
        return (part.v * share[:, None, :, None]).sum(2, keepdim=True)
    own = call.i - call.j0
    if call.first < call.j0 or call.last >= call.j0 + call.keys:
        raise HeadwiseError(
            f'Blend(target="own") needs self-attention; {call.site and call.site.name} attends elsewhere.'
        )
    return part.v[:, :, own]


def _gained(call: AttentionCall, edit: HeadGain, z: Tensor) -> Tensor:
    if isinstance(edit.gain, Tensor):
        try:
            return edit.gain.to(z).expand_as(z)
        except RuntimeError:
            raise HeadwiseError(
                f"HeadGain(gain=...) must broadcast to {tuple(z.shape)}; got {tuple(edit.gain.shape)}."
            ) from None
    if edit.gain == "mean":
        share = call.valid() / call.valid().sum(1, keepdim=True).clamp(min=1)
        return (z * share.to(z)[:, None, :, None]).sum(2, keepdim=True).expand_as(z)
    if edit.gain == "resample":
        if z.shape[0] < 2:
            raise HeadwiseError('HeadGain(gain="resample") takes another sample\'s output: give a batch of 2 or more.')
        return z.roll(1, 0)
    return z * float(edit.gain)
