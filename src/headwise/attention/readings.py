"""What can be read from an attention call, as data.

For one head: scores s_ij, weights a_ij = softmax_j(s_ij), output z_i = sum_j a_ij v_j. A reading says which reduction
of these is wanted, where (layers, heads, queries) and how finely (`per="query"`, or `per="head"`: the mean over the
valid queries of everything read, with count and standard error). `dense.py` holds each reading's meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models.segments import is_relative

Selection = int | Sequence[int] | None
RELATIVE_LAGS = {"self": 0, "previous": 1, "next": -1}
"""Relative segments that are one key per query: key = query - lag."""


def as_tuple(value: Any, argument: str) -> tuple[int, ...] | None:
    """Layers or heads as a tuple of numbers; None stands for all."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    try:
        return tuple(int(v) for v in value)
    except (TypeError, ValueError):
        raise HeadwiseError(f"{argument} must be a number, a list of numbers or None; got {value!r}.") from None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Base of all readings: where to read and how finely."""

    per: Literal["query", "head"] = "query"
    layers: Selection = None
    heads: Selection = None
    queries: Any = "all"
    stream: str | None = None
    name: str | None = None

    variables: ClassVar[tuple[str, ...]] = ()
    dims: ClassVar[tuple[str, ...]] = ()
    """The dims after (sample, layer, head, query) that every variable of the reading has."""
    over: ClassVar[str] = "query"
    """What the values run along: "query", "key" (column sums), "pair" or "none"."""

    def __post_init__(self) -> None:
        label = type(self).__name__
        if self.per not in ("query", "head"):
            raise HeadwiseError(f'{label}(per=...) must be "query" or "head"; got {self.per!r}.')
        object.__setattr__(self, "layers", as_tuple(self.layers, f"{label}(layers=...)"))
        object.__setattr__(self, "heads", as_tuple(self.heads, f"{label}(heads=...)"))
        queries = self.queries
        if isinstance(queries, str):
            if queries != "all":
                raise HeadwiseError(
                    f'{label}(queries=...) must be "all", how many to sample, or positions; got {queries!r}.'
                )
        elif isinstance(queries, int):
            if queries < 1:
                raise HeadwiseError(f"{label}(queries=...) must sample at least 1 query; got {queries}.")
        else:
            object.__setattr__(self, "queries", as_tuple(queries, f"{label}(queries=...)"))

    @property
    def chosen_layers(self) -> tuple[int, ...] | None:
        return cast("tuple[int, ...] | None", self.layers)

    @property
    def chosen_heads(self) -> tuple[int, ...] | None:
        return cast("tuple[int, ...] | None", self.heads)

    def names(self) -> dict[str, str]:
        """Variable -> the name it gets in the result (`name=` replaces the stem of the first variable)."""
        if self.name is None:
            return {v: v for v in self.variables}
        stem = self.variables[0]
        return {
            v: self.name if v == stem else self.name + (v.removeprefix(stem) if v.startswith(stem) else f"_{v}")
            for v in self.variables
        }

    def key(self) -> "Reading":
        """The reading without its name and fineness: equal keys share one computation."""
        return replace(self, name=None, per="query")

    def __hash__(self) -> int:
        return hash((type(self), *(_hashable(getattr(self, f.name)) for f in fields(self))))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            _hashable(getattr(self, f.name)) == _hashable(getattr(other, f.name)) for f in fields(self)
        )


def _hashable(value: Any) -> Any:
    return ("tensor", id(value)) if isinstance(value, Tensor) else value


def _names(value: Any, argument: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else tuple(value)
    if not names or not all(isinstance(n, str) for n in names):
        raise HeadwiseError(f"{argument} must be segment names; got {value!r}.")
    return names


@dataclass(frozen=True, eq=False)
class Mass(Reading):
    """`mass[g] = sum over keys j in segment g of a_ij`, up to 32 segments at once (None: all labels of the run).

    Relative segments work beside labels: "self", "previous", "next", "first" (the key at position 0), "same" (keys of
    the query's own segment) and "window:W" (keys with |i-j| <= W).
    """

    segments: Sequence[str] | str | None = None
    variables = ("mass",)
    dims = ("segment",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "segments", _names(self.segments, "Mass(segments=...)"))
        if self.segments is not None and len(self.segments) > 32:
            raise HeadwiseError(f"Mass(segments=...) takes at most 32 segments; got {len(self.segments)}.")


@dataclass(frozen=True, eq=False)
class Entropy(Reading):
    """`-sum_j a_ij log a_ij`, in nats."""

    variables = ("entropy",)


@dataclass(frozen=True, eq=False)
class Top(Reading):
    """The k largest weights of each query and the keys they are at (first key wins a tie; -1 where there is none)."""

    k: int = 1
    variables = ("top_value", "top_index")
    dims = ("rank",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or self.k < 1:
            raise HeadwiseError(f"Top(k=...) must be a whole number of at least 1; got {self.k!r}.")


@dataclass(frozen=True, eq=False)
class Distance(Reading):
    """`sum_j a_ij |i-j|` and `sum_j a_ij (i-j)^2`, in tokens and tokens squared."""

    variables = ("distance", "distance_sq")


@dataclass(frozen=True, eq=False)
class LogSumExp(Reading):
    """`log sum_j exp s_ij`, the log of the softmax's denominator (a sink column included)."""

    variables = ("lse",)


@dataclass(frozen=True, eq=False)
class _Places(Reading):
    """Chosen (query, key) places: fixed lags (key = query - lag), target keys per query, or pairs."""

    lags: Sequence[int] | int | None = None
    targets: Tensor | None = None
    pairs: Sequence[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        label = type(self).__name__
        if sum(x is not None for x in (self.lags, self.targets, self.pairs)) != 1:
            raise HeadwiseError(f"{label} wants exactly one of lags=, targets= and pairs=.")
        object.__setattr__(self, "lags", as_tuple(self.lags, f"{label}(lags=...)"))
        if self.targets is not None and (
            not isinstance(self.targets, Tensor) or self.targets.ndim not in (2, 3) or self.targets.is_floating_point()
        ):
            raise HeadwiseError(f"{label}(targets=...) must be a whole-number tensor [query, m] or [batch, query, m].")
        if self.pairs is not None:
            try:
                object.__setattr__(self, "pairs", tuple((int(i), int(j)) for i, j in self.pairs))
            except (TypeError, ValueError):
                raise HeadwiseError(f"{label}(pairs=...) must be (query, key) pairs; got {self.pairs!r}.") from None
            if self.queries != "all":
                raise HeadwiseError(f"{label}(pairs=...) names its queries itself: leave out queries=.")

    @property
    def kind(self) -> str:
        return "lag" if self.lags is not None else "target" if self.targets is not None else "pair"


@dataclass(frozen=True, eq=False)
class At(_Places):
    """The weights `a_ij` at chosen places: `lags=` (key = query - lag), `targets=` keys per query, or `pairs=`.

    `targets` is [query, m] or [batch, query, m], row = the query's position, -1 = none. Places no key is at give 0.
    """

    variables = ("at",)


@dataclass(frozen=True, eq=False)
class Scores(_Places):
    """The scores `s_ij` (after scale and edits) at chosen places, given as in `At`; nan where masked or absent."""

    variables = ("scores",)


@dataclass(frozen=True, eq=False)
class Received(Reading):
    """`received[j] = sum_i a_ij` over the chosen queries, and how many of these queries can see the key."""

    variables = ("received", "received_visible")
    over = "key"


@dataclass(frozen=True, eq=False)
class SegmentEntropy(Reading):
    """Entropy (nats) of the weights within one segment, renormalised to sum to 1; 0 where the segment gets none."""

    segments: Sequence[str] | str | None = None
    variables = ("segment_entropy",)
    dims = ("segment",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "segments", _names(self.segments, "SegmentEntropy(segments=...)"))
        if any(is_relative(n) and n != "first" for n in self.segments or ()):
            raise HeadwiseError(f"SegmentEntropy(segments=...) takes labelled segments only; got {self.segments!r}.")


@dataclass(frozen=True, eq=False)
class Propagate(Reading):
    """`A x` (side="right", x: [key, column]) or `x^T A` (side="left", x: [query, column]) without the matrix."""

    x: Tensor = field(default=None)  # type: ignore[assignment]
    side: Literal["right", "left"] = "right"
    variables = ("propagate",)
    dims = ("column",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.x, Tensor) or self.x.ndim != 2 or not self.x.is_floating_point():
            raise HeadwiseError("Propagate(x=...) must be a floating-point tensor [token, column].")
        if self.side not in ("right", "left"):
            raise HeadwiseError(f'Propagate(side=...) must be "right" or "left"; got {self.side!r}.')


@dataclass(frozen=True, eq=False)
class HeadOutput(Reading):
    """What a head writes: the vector z_i ("vector"), its norm ("norm"), or the norm of its part in the residual
    stream, `|z_i W_O|` ("residual_norm"). Read after all edits."""

    what: Literal["vector", "norm", "residual_norm"] = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("vector", "norm", "residual_norm"):
            raise HeadwiseError(f'HeadOutput(what=...) must be "vector", "norm" or "residual_norm"; got {self.what!r}.')

    @property
    def variables(self) -> tuple[str, ...]:  # type: ignore[override]
        return ({"vector": "head_output", "norm": "head_output_norm", "residual_norm": "residual_norm"}[self.what],)

    @property
    def dims(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("channel",) if self.what == "vector" else ()


@dataclass(frozen=True, eq=False)
class Inputs(Reading):
    """q, k, v of chosen heads and tokens (for k and v the head's own key-value head), or their mean and covariance
    over the tokens (`moments=True`: `input_q_mean` [channel], `input_q_cov` [channel, channel2], per sample)."""

    what: Sequence[str] = ("q", "k", "v")
    moments: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        what = (self.what,) if isinstance(self.what, str) else tuple(self.what)
        if not what or not set(what) <= {"q", "k", "v"}:
            raise HeadwiseError(f'Inputs(what=...) must name some of "q", "k", "v"; got {self.what!r}.')
        object.__setattr__(self, "what", what)

    @property
    def variables(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.moments:
            return tuple(f"input_{w}_{m}" for w in self.what for m in ("mean", "cov"))
        return tuple(f"input_{w}" for w in self.what)

    @property
    def over(self) -> str:  # type: ignore[override]
        return "none" if self.moments else "token"


@dataclass(frozen=True, eq=False)
class Map(Reading):
    """Dense rows of the weights, `a_ij` for the chosen layers, heads and queries. Ask for few: this is the matrix."""

    variables = ("map",)
    dims = ("key",)


def concrete(names: Sequence[str] | None, labels: Sequence[str]) -> tuple[str, ...]:
    """The segment names a reading means in a run with these labels; None stands for every label."""
    chosen = tuple(names) if names is not None else tuple(labels)
    for name in chosen:
        if name not in labels and not is_relative(name):
            raise HeadwiseError(
                f"There is no segment {name!r} in this run: its segments are {', '.join(labels) or 'none'}, and "
                'relative ones are "self", "previous", "next", "first", "same", "window:W".'
            )
    return chosen


def sample_queries(count: int, valid: Tensor, seed: int) -> Tensor:
    """`count` random rows that are valid in some sample, sorted (all of them when there are no more)."""
    rows = valid.any(0).nonzero().flatten().cpu()
    if len(rows) <= count:
        return rows
    generator = torch.Generator().manual_seed(seed)
    return rows[torch.randperm(len(rows), generator=generator)[:count]].sort().values
