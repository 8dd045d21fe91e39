"""One attention call, declared: everything its output and its statistics depend on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.attention.mask import Mask
from headwise.attention.once import numbers, on

if TYPE_CHECKING:
    from headwise.attention.form import Form
    from headwise.attention.rope import Rotary
    from headwise.models.anatomy import Site


@dataclass(frozen=True)
class Labels:
    """The segment of every key and query of one call, as numbers into `names`."""

    names: tuple[str, ...]
    keys: Int[Tensor, "#batch key"]
    queries: Int[Tensor, "#batch query"]


@dataclass
class AttentionCall:
    """`s_ij = softcap(scale q_i.k_j) + bias`, masked; `a_ij = softmax_j(s_ij)` with an optional sink column."""

    q: Float[Tensor, "batch heads query dim"]
    k: Float[Tensor, "batch kv_heads key dim"]
    v: Float[Tensor, "batch kv_heads key value_dim"]
    scale: float
    mask: Mask = field(default_factory=Mask)
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None
    bias: Float[Tensor, "#batch #heads #query #key"] | None = None
    i: Int[Tensor, " query"] = None  # type: ignore[assignment]
    """Absolute positions of the queries."""
    j0: int = 0
    """Absolute position of the first key."""
    query_valid: Bool[Tensor, "batch query"] | None = None
    labels: Labels | None = None
    site: Site | None = None
    rotary: Rotary | None = None
    """The rotation q and k went through, where an edit wants to turn them again."""
    head_ids: list[int] | None = None
    """The numbers of the heads in q, where q holds some of the layer's only."""
    form: Form | None = None
    """How scores and weights are made, where not as above."""
    inner: bool = False
    """It makes what another call of its layer attends with. Edits act on it; readings see it where they ask for it."""
    host_i: Int[Tensor, " query"] | None = None
    """`i` on the CPU, where reading a position waits for no device."""

    def __post_init__(self) -> None:
        if self.i is None:
            self.i = torch.arange(self.q.shape[2], device=self.q.device)
        if self.host_i is None and self.i.device.type == "cpu":
            self.host_i = self.i
        if self.head_ids is None:
            self.head_ids = list(range(self.q.shape[1]))

    @property
    def places(self) -> Int[Tensor, " query"]:
        """Absolute positions of the queries, on the CPU."""
        if self.host_i is None:
            self.host_i = self.i.cpu()
        return self.host_i

    @property
    def first(self) -> int:
        """The first query's position."""
        return int(self.places[0])

    @property
    def last(self) -> int:
        """The last query's position."""
        return int(self.places[-1])

    @property
    def local(self) -> bool:
        """Whether a row's weights need that row and head alone."""
        return self.form is None or self.form.local

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def queries(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """How many query heads share a key-value head."""
        return self.q.shape[1] // self.k.shape[1]

    def valid(self) -> Bool[Tensor, "batch query"]:
        if self.query_valid is not None:
            return self.query_valid
        return torch.ones(self.batch, self.queries, dtype=torch.bool, device=self.q.device)

    def select(self, rows: Int[Tensor, " row"] | None = None, heads: list[int] | None = None) -> AttentionCall:
        """The same call for some of its queries (places, not positions) and heads only."""
        call = self
        if rows is not None:
            places = None if rows.is_cuda else self.places[rows]
            rows = on(rows, self.q.device)
            mask = self.mask
            mask = replace(
                mask,
                allowed=pick(mask.allowed, 2, rows),
                added=pick(mask.added, 2, rows),
                indices=None if mask.indices is None else mask.indices[:, rows],
            )
            labels = self.labels and replace(self.labels, queries=self.labels.queries[:, rows])
            call = replace(
                call,
                q=call.q[:, :, rows],
                i=call.i[rows],
                host_i=places,
                mask=mask,
                bias=pick(call.bias, 2, rows),
                query_valid=None if call.query_valid is None else call.query_valid[:, rows],
                labels=labels,
            )
        if heads is not None:
            index = numbers(tuple(heads), self.q.device)
            kv = index // self.group
            mask = replace(call.mask, allowed=pick(call.mask.allowed, 1, index), added=pick(call.mask.added, 1, index))
            call = replace(
                call,
                q=call.q[:, index],
                k=call.k[:, kv],
                v=call.v[:, kv],
                mask=mask,
                bias=pick(call.bias, 1, index),
                sinks=None if call.sinks is None else call.sinks[index],
                head_ids=[self.head_ids[h] for h in heads],  # type: ignore[index]
            )
        return call


def expand_kv(call: AttentionCall) -> AttentionCall:
    """One key-value head for every query head, where an edit treats heads of a group differently."""
    if call.group == 1:
        return call
    return replace(call, k=call.k.repeat_interleave(call.group, 1), v=call.v.repeat_interleave(call.group, 1))


def pick(x: Tensor | None, dim: int, index: Tensor) -> Tensor | None:
    """Entries of one dim, where that dim is there (size 1 means "the same for all")."""
    return x if x is None or x.shape[dim] == 1 else x.index_select(dim, index)
