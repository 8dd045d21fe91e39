"""What can be changed in an attention call, as data. Every edit is undone exactly on leaving `attend`.

Order inside one call: Recompute, Shift, Rebase (on q and k) -> scale, softcap, position bias -> ScoreMap -> ScoreBias
-> mask -> sink column -> softmax -> Reweight -> Blend -> HeadGain. Edits of one kind apply in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.attention.readings import as_tuple
from headwise.errors import HeadwiseError
from headwise.models.segments import is_relative

if TYPE_CHECKING:
    from headwise.attention.call import AttentionCall

OTHERS = "*"
"""In `Reweight`: the keys of no other group."""
KeyRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(b, h, i, j)` -> which keys j a query i of sample b is meant to see: all four broadcast, as FlexAttention's mask
functions have them. Positions are absolute, and h is 0: heads are chosen by `heads=`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """Base of all edits: where to apply it. `heads` are numbers (in every chosen layer) or (layer, head) pairs."""

    layer: int | Sequence[int] | None = None
    heads: Sequence[int] | Sequence[tuple[int, int]] | None = None
    stream: str | None = None

    def __post_init__(self) -> None:
        label = type(self).__name__
        layers = as_tuple(self.layer, f"{label}(layer=...)")
        heads: Any = self.heads
        if heads is not None:
            heads = (heads,) if isinstance(heads, int) else tuple(heads)
            if not heads:
                raise HeadwiseError(f"{label}(heads=...) is empty: name at least one head, or None for all.")
            if all(not isinstance(h, int) and len(h) == 2 for h in heads):
                if layers is not None:
                    raise HeadwiseError(f"{label}: give heads as (layer, head) pairs or layer=, not both.")
                heads = tuple((int(a), int(b)) for a, b in heads)
            elif not all(isinstance(h, int) for h in heads):
                raise HeadwiseError(f"{label}(heads=...) must be numbers or (layer, head) pairs; got {heads!r}.")
        object.__setattr__(self, "layer", layers)
        object.__setattr__(self, "heads", heads)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...] | None:
        """The (layer, head) pairs, where heads were given so."""
        return None if not self.heads or isinstance(self.heads[0], int) else self.heads  # type: ignore[return-value]

    @property
    def chosen_layers(self) -> tuple[int, ...] | None:
        """The layers named, None for all."""
        if self.pairs is not None:
            return tuple(sorted({layer for layer, _ in self.pairs}))
        return self.layer  # type: ignore[return-value]

    def heads_in(self, layer: int, count: int) -> list[int] | None:
        """The heads this edit means in a layer of `count` heads; None = not this layer."""
        if self.chosen_layers is not None and layer not in self.chosen_layers:
            return None
        if self.pairs is not None:
            chosen = [h for (where, h) in self.pairs if where == layer]
        else:
            chosen = list(range(count)) if self.heads is None else list(self.heads)  # type: ignore[arg-type]
        for head in chosen:
            if not 0 <= head < count:
                raise HeadwiseError(
                    f"{type(self).__name__}(heads=...) names head {head}, but layer {layer} has heads 0 to {count - 1}."
                )
        return chosen or None


@dataclass(frozen=True, eq=False)
class ScoreBias(Edit):
    """`s_ij += value` for some keys, or `value` times a vector over keys, for the queries of a segment (None: all).
    `log g` multiplies the keys' weights by g before renormalising; `-inf` is a knockout.

    Keys are those of a segment (a name, also a relative one), bools over positions, or a rule of query and key
    (`KeyRule`), which is asked for one block at a time. Keys past the end of a tensor (generated later) are not meant.
    """

    value: float = 0.0
    keys: str | Float[Tensor, " key"] | Bool[Tensor, "*batch key"] | KeyRule | None = None
    queries: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.value, (int, float)) or self.value != self.value or self.value == float("inf"):
            raise HeadwiseError(f"ScoreBias(value=...) must be a number or -inf; got {self.value!r}.")
        if isinstance(self.keys, Tensor):
            some = self.keys.dtype == torch.bool
            if not 1 <= self.keys.ndim <= 1 + some:
                raise HeadwiseError(
                    "ScoreBias(keys=...) must be one number a key, or bools [key] or [batch, key]; got shape "
                    f"{tuple(self.keys.shape)}."
                )
            if not some and self.value == -float("inf"):
                raise HeadwiseError("ScoreBias(value=-inf) wants bools: put -inf into the vector over keys itself.")
        elif self.keys is not None and not isinstance(self.keys, str) and not callable(self.keys):
            raise HeadwiseError(
                f"ScoreBias(keys=...) must be a segment name, a tensor over keys or a rule; got {self.keys!r}."
            )

    @cached_property
    def cuts(self) -> bool:
        """Whether it takes keys away altogether."""
        vector = isinstance(self.keys, Tensor) and bool((self.keys.float().abs() == torch.inf).any())
        return vector or self.value == -float("inf")


@dataclass(frozen=True, eq=False)
class ScoreMap(Edit):
    """`s_ij -> fn(s_ij)` pointwise, for keys and queries of the named segments (None: all). `placed`: `fn(s_ij, i, j)`,
    told the absolute positions of query and key, which broadcast to the scores."""

    fn: Callable[..., Tensor] = torch.clone
    keys: str | None = None
    queries: str | None = None
    placed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise HeadwiseError(f"ScoreMap(fn=...) must be a function of a score tensor; got {self.fn!r}.")


@dataclass(frozen=True, eq=False)
class Reweight(Edit):
    """`a'_ij = a_ij * w_i[group(j)]`, the weights `w = rule(masses)` a function of the groups' masses.

    `groups` are segment names, or bools over keys, that don't overlap; "*" stands for all other keys, which otherwise
    keep their weight. `rule` takes and returns [batch, heads, query, group]; weights must be finite and not negative,
    and need not keep the sum."""

    rule: Callable[[Tensor], Tensor] = torch.ones_like
    groups: Sequence[str | Bool[Tensor, " key"]] = ()
    queries: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        single = isinstance(self.groups, str | Tensor)
        object.__setattr__(self, "groups", (self.groups,) if single else tuple(self.groups))
        if not self.groups or len(set(self.groups)) != len(self.groups) or self.groups == (OTHERS,):
            raise HeadwiseError(f"Reweight(groups=...) must name different segments; got {self.groups!r}.")
        if any(isinstance(g, Tensor) and (g.ndim != 1 or g.dtype != torch.bool) for g in self.groups):
            raise HeadwiseError("Reweight(groups=...): a group that is no name must be one bool a key.")
        others = [g for g in self.groups if isinstance(g, str) and g != OTHERS]
        alone = [g for g in others if is_relative(g) and (g != "first" or len(others) > 1)]
        if len(self.groups) > 1 and alone:
            raise HeadwiseError(
                f"Reweight(groups=...): a relative segment overlaps others, give it alone; got {self.groups!r}."
            )
        if not callable(self.rule):
            raise HeadwiseError(f"Reweight(rule=...) must be a function of the masses; got {self.rule!r}.")

    def factors(self, masses: Tensor) -> Tensor:
        """The rule's weights, of which only the shape is looked at."""
        weights = self.rule(masses)
        if weights.shape != masses.shape:
            raise HeadwiseError(
                f"Reweight(rule=...) must return weights of shape {tuple(masses.shape)}; got {tuple(weights.shape)}."
            )
        return weights

    def weights(self, masses: Tensor) -> Tensor:
        """The rule's weights, looked at."""
        weights = self.factors(masses)
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise HeadwiseError("Reweight(rule=...) returned weights that are negative or not finite.")
        return weights


@dataclass(frozen=True, eq=False)
class Blend(Edit):
    """`z' = (1 - alpha) z + alpha z_target`; target: the query's own value ("own"), the mean value of the sequence's
    valid keys ("mean"), the mean value of the keys the query can see ("uniform"), or a vector for every head chosen.

    `alpha` is a number, or one for every head chosen (gradients reach it). `tokens` names the segment of queries it is
    for (None: all)."""

    alpha: float | Float[Tensor, " head"] = 0.0
    target: Literal["own", "mean", "uniform"] | Float[Tensor, "head value_dim"] = "own"
    tokens: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target, Tensor):
            if self.target.ndim != 2:
                raise HeadwiseError(
                    f"Blend(target=...) must be [head, value_dim]; got shape {tuple(self.target.shape)}."
                )
        elif self.target not in ("own", "mean", "uniform"):
            raise HeadwiseError(f'Blend(target=...) must be "own", "mean", "uniform" or a tensor; got {self.target!r}.')


@dataclass(frozen=True, eq=False)
class HeadGain(Edit):
    """`z'_h = gain * z_h` (0 ablates), or instead of a number: "mean" (the head's mean output over this call's valid
    queries), "resample" (the output of the next sample in the batch) or a tensor put in its place, broadcastable to
    [batch, heads chosen, query, value_dim]. `tokens` names the segment of queries it is for (None: all)."""

    gain: float | str | Tensor = 1.0
    tokens: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gain, str) and self.gain not in ("mean", "resample"):
            raise HeadwiseError(
                f'HeadGain(gain=...) must be a number, "mean", "resample" or a tensor; got {self.gain!r}.'
            )


class Recomputed(NamedTuple):
    """What `rows` are computed with: None stands for the model's own."""

    rows: Bool[Tensor, "#batch query"]
    q: Float[Tensor, "batch heads query dim"] | None = None
    k: Float[Tensor, "batch kv_heads key dim"] | None = None
    v: Float[Tensor, "batch kv_heads key value_dim"] | None = None


@dataclass(frozen=True, eq=False)
class Recompute(Edit):
    """`z_i = sum_j softmax_j(scale * q'_i . k'_j) v'_j` for some queries i: computed with other queries, keys and
    values, while the other queries see the model's own. `make(call)` says with which (None: not in this call)."""

    make: Callable[[AttentionCall], Recomputed | None] = lambda call: None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.make):
            raise HeadwiseError(f"Recompute(make=...) must be a function of an AttentionCall; got {self.make!r}.")


@dataclass(frozen=True, eq=False)
class Shift(Edit):
    """`q += d`, `k += d`: vectors [head_dim] or [heads chosen, head_dim], for tokens of a segment (None: all).

    For k the heads are query heads too: each gets its own copy of the shifted keys."""

    q: Tensor | None = None
    k: Tensor | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q is None and self.k is None:
            raise HeadwiseError("Shift wants q= or k=: a vector to add to queries or keys.")


@dataclass(frozen=True, eq=False)
class Rebase(Edit):
    """Queries and keys rotated anew with another RoPE base (`theta`), or another position for each token
    (`positions`, one number a token). The model must use rotary embeddings; a scaling it has is done with the new base.

    A vector of N bases gives each row of the batch its own: row r takes base r modulo N, and a batch holds one or more
    groups of N rows. Keys stay in a cache as the model made them, and are turned from there at every call."""

    theta: float | Float[Tensor, " base"] | None = None
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is None and self.positions is None:
            raise HeadwiseError("Rebase wants theta= (another RoPE base) or positions= (one a token).")
        if self.theta is not None:
            bases = torch.as_tensor(self.theta)
            if bases.ndim > 1 or not bases.numel() or not bool((bases > 1).all()):
                raise HeadwiseError(
                    f"Rebase(theta=...) must be one base or a vector of them, above 1; got {self.theta!r}."
                )
