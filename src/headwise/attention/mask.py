"""Which keys a query may see, without the n x n matrix.

Rows are queries and columns are keys, both at absolute positions. A mask is asked for one block at a time; the forms
that decide the cost (causal, window, padding) are known as such, any other rule is evaluated block by block.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Part = tuple[int, int, Tensor]
"""Columns start to stop, and the allowed keys there: bool, broadcastable to [batch, heads, rows, columns]."""

CACHE_BYTES = 64 * 2**20


@dataclass(eq=False)
class Mask:
    """All given conditions hold together. `left`/`right`: i - j <= left, j - i <= right (None: no bound)."""

    left: int | None = None
    right: int | None = None
    key_valid: Bool[Tensor, "batch key"] | None = None
    rule: Rule | None = None
    vmap: bool = False
    allowed: Bool[Tensor, "#batch #heads #query #key"] | None = None
    added: Float[Tensor, "#batch #heads #query #key"] | None = None
    indices: Int[Tensor, "batch query top"] | None = None
    _cache: dict = field(default_factory=dict, repr=False)

    @property
    def causal(self) -> bool:
        return self.right is not None and self.right <= 0

    def extent(self, i: Int[Tensor, " row"], j0: int, keys: int) -> tuple[int, int]:
        """The columns, start to stop, outside which no query of these rows sees a key."""
        low, high = bounds(i)
        start, stop = 0, keys
        if self.left is not None:
            start = max(0, low - self.left - j0)
        if self.right is not None:
            stop = min(keys, high + self.right - j0 + 1)
        return min(start, stop), stop

    def parts(self, i: Int[Tensor, " row"], rows: slice | Tensor, j0: int, start: int, stop: int) -> list[Part]:
        """The blocked pieces of the block rows x [start, stop); an empty list says every key there is seen.

        i: the rows' absolute positions; rows: their place in the call's queries; j0: the first key's position.
        """
        low, high = bounds(i)
        found: list[Part] = []
        if self.right is not None and stop - 1 + j0 > low + self.right:
            first = max(start, low + self.right + 1 - j0)
            found.append((first, stop, self._band(i, low, high, first + j0, stop + j0)))
        if self.left is not None and start + j0 < high - self.left:
            last = min(stop, high - self.left - j0)
            found.append((start, last, self._band(i, low, high, start + j0, last + j0)))
        if self.key_valid is not None:
            valid = self.key_valid[:, start:stop]
            if not valid.all():
                found.append((start, stop, valid[:, None, None]))
        if self.rule is not None:
            seen = self._ruled(i, j0, start, stop)
            if seen is not None:
                found.append((start, stop, seen))
        if self.allowed is not None:
            seen = cut(self.allowed, rows, start, stop)
            if not seen.all():
                found.append((start, stop, seen))
        if self.indices is not None:
            chosen = self.indices[:, rows].long()
            seen = torch.zeros(*chosen.shape[:2], stop - start + 1, dtype=torch.bool, device=i.device)
            inside = (chosen >= start) & (chosen < stop)
            seen.scatter_(2, torch.where(inside, chosen - start, stop - start), True)
            found.append((start, stop, seen[..., :-1][:, None]))
        return found

    def _band(self, i: Tensor, low: int, high: int, start: int, stop: int) -> Tensor:
        """Which keys at positions start to stop lie between `left` and `right`; kept, every layer asks the same."""
        key = ("band", low, high, len(i), start, stop)
        if high - low + 1 == len(i) and key in self._cache:
            return self._cache[key]
        gap = i[:, None] - torch.arange(start, stop, device=i.device)
        inside = torch.ones_like(gap, dtype=torch.bool)
        if self.right is not None:
            inside &= gap >= -self.right
        if self.left is not None:
            inside &= gap <= self.left
        return self._keep(key, inside[None, None], high - low + 1 == len(i))

    def _keep(self, key: tuple, value: Tensor, regular: bool) -> Tensor:
        if regular and sum(t.numel() for t in self._cache.values() if t is not None) < CACHE_BYTES:
            self._cache[key] = value
        return value

    def _ruled(self, i: Tensor, j0: int, start: int, stop: int) -> Tensor | None:
        """The rule on one block, None where all is allowed; kept, since every layer of a forward asks the same."""
        low, high = bounds(i)
        key = ("rule", low, high, len(i), j0, start, stop)
        regular = high - low + 1 == len(i)
        if regular and key in self._cache:
            return self._cache[key]
        j = torch.arange(start, stop, device=i.device) + j0
        seen = self.evaluate(i, j)
        answer = None if bool(seen.all()) else seen
        if regular and sum(t.numel() for t in self._cache.values() if t is not None) < CACHE_BYTES:
            self._cache[key] = answer
        return answer

    def evaluate(self, i: Tensor, j: Tensor) -> Bool[Tensor, "batch one row column"]:
        """The rule for all pairs of i [row] and j [column]."""
        assert self.rule is not None
        batch = torch.arange(self.batch, device=i.device)
        head = torch.zeros(1, dtype=torch.long, device=i.device)
        if not self.vmap:
            seen = self.rule(
                batch[:, None, None, None], head[None, :, None, None], i[None, None, :, None], j[None, None, None, :]
            )
            return torch.as_tensor(seen, device=i.device).expand(self.batch, 1, len(i), len(j))
        from transformers.masking_utils import TransformGetItemToIndex, _vmap_expansion_sdpa

        with TransformGetItemToIndex():
            return _vmap_expansion_sdpa(self.rule)(batch, head, i, j)

    batch: int = 1
    """How many samples the rule knows."""

    def at(self, i: Int[Tensor, " row"], rows: slice | Tensor, j: Int[Tensor, "batch row place"], j0: int) -> Tensor:
        """Whether single keys are seen: columns j (not positions) -> bool [batch, heads, row, place]."""
        position = j + j0
        seen = torch.ones_like(j, dtype=torch.bool)
        gap = i[None, :, None] - position
        if self.right is not None:
            seen &= gap >= -self.right
        if self.left is not None:
            seen &= gap <= self.left
        if self.key_valid is not None:
            valid = self.key_valid.expand(j.shape[0], -1)
            seen &= valid.gather(1, j.flatten(1)).view(j.shape)
        seen = seen[:, None]
        if self.rule is not None:
            seen = seen & self._rule_at(i, position)[:, None]
        if self.allowed is not None:
            seen = seen & gather_places(self.allowed, rows, j)
        if self.indices is not None:
            seen = seen & (self.indices[:, rows, None, :] == j[..., None]).any(-1)[:, None]
        return seen

    def _rule_at(self, i: Tensor, position: Tensor) -> Tensor:
        assert self.rule is not None
        zero = torch.zeros((), dtype=torch.long, device=i.device)
        batch = torch.arange(position.shape[0], device=i.device)[:, None, None].expand_as(position)
        query = i[None, :, None].expand_as(position)
        if self.vmap:
            from transformers.masking_utils import TransformGetItemToIndex

            with TransformGetItemToIndex():
                flat = torch.vmap(self.rule, in_dims=(0, None, 0, 0))(
                    batch.flatten(), zero, query.flatten(), position.flatten()
                )
            return flat.view(position.shape)
        return torch.as_tensor(self.rule(batch, zero, query, position)).expand_as(position)

    def dense(self, i: Int[Tensor, " query"], j0: int, keys: int) -> Bool[Tensor, "batch heads query key"]:
        """The whole mask, for the reference and for code that touches it."""
        seen = torch.ones(1, 1, len(i), keys, dtype=torch.bool, device=i.device)
        for start, stop, part in self.parts(i, slice(None), j0, 0, keys):
            full = torch.ones(1, 1, len(i), keys, dtype=torch.bool, device=i.device)
            full = full.expand(part.shape[0], part.shape[1], -1, -1).clone()
            full[..., start:stop] = part
            seen = seen & full
        return seen


def bounds(i: Int[Tensor, " row"]) -> tuple[int, int]:
    """First and last of some rows' positions, which always ascend."""
    return int(i[0]), int(i[-1])


def cut(x: Tensor, rows: slice | Tensor, start: int, stop: int) -> Tensor:
    """Rows and columns of a [batch, heads, query, key] tensor whose query and key dims may be 1."""
    x = x if x.shape[2] == 1 else x[:, :, rows]
    return x if x.shape[3] == 1 else x[..., start:stop]


def gather_places(x: Tensor, rows: slice | Tensor, j: Int[Tensor, "batch row place"]) -> Tensor:
    """x[b, h, i, j] at columns j, for x [batch or 1, heads or 1, query or 1, key or 1]."""
    x = x if x.shape[2] == 1 else x[:, :, rows]
    batch, heads = max(x.shape[0], j.shape[0]), x.shape[1]
    x = x.expand(batch, heads, j.shape[1], x.shape[3])
    if x.shape[3] == 1:
        return x.expand(-1, -1, -1, j.shape[2])
    return x.gather(3, j[:, None].expand(batch, heads, -1, -1))
