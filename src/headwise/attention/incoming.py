"""What transformers hands over, read: one forward of the model, and each of its attention calls as an `AttentionCall`.

What all layers of a forward share (positions, masks, padding) is read once and kept on the `Frame`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwise.attention.call import AttentionCall
from headwise.attention.carrier import Carrier
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError


class Seen(NamedTuple):
    """The keys a single query sees, as numbers: position - left to position + right, counted from the first key."""

    position: int
    j0: int
    left: int | None
    right: int | None
    valid: Tensor | None
    """[batch, key], one byte each: which keys are no padding."""


class Frame:
    """One forward of the whole model: which sites were called, how much came before it in a cache, its token ids where
    it was given any, and the padding."""

    def __init__(self, past: int, padding: Any = None, ids: Any = None):
        self.past = past
        self.ids: Tensor | None = ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
        self.calls: Counter[tuple[str, bool]] = Counter()
        """Of each site, apart from its inner ones."""
        self._padding = padding
        self._kept: dict[tuple, Any] = {}
        self._last: tuple[Any, Seen | None] | None = None

    def _keep(self, key: tuple, make: Any, *arguments: Any) -> Any:
        # What the key knows by its id must live as long as the key.
        if key not in self._kept:
            self._kept[key] = make(*arguments), arguments
        return self._kept[key][0]

    @property
    def padding(self) -> Tensor | None:
        """[batch, position]: tokens, as far as the model was told that some are none."""
        return self._keep(("padding",), some_padding, self._padding)

    def positions(self, start: int, queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of queries one after the other, on the device and on the CPU."""

        def make() -> tuple[Tensor, Tensor]:
            host = torch.arange(start, start + queries)
            return host if device.type == "cpu" else torch.arange(start, start + queries, device=device), host

        return self._keep(("positions", start, queries, device), make)

    def valid(self, padding: Tensor | None, start: int, queries: int, batch: int) -> Tensor | None:
        """Which queries are tokens; None where all are, or nobody knows."""
        key = ("valid", id(padding), start, queries, batch)
        return self._keep(key, query_validity, padding, start, queries, batch)

    def seen(self, given: Any) -> Seen | None:
        """What the only query of this forward sees under the mask `given`; None where that takes more than numbers."""
        if self._last is None or self._last[0] is not given:
            self._last = given, self._keep(("seen", id(given)), only_query, given, self.past)
        return self._last[1]


def some_padding(padding: Any) -> Tensor | None:
    padded = isinstance(padding, Tensor) and padding.ndim == 2 and not bool(padding.all())
    return padding.bool() if padded else None


def only_query(given: Any, past: int) -> Seen | None:
    if given is None:
        return Seen(past, 0, None, None, None)
    if not isinstance(given, Carrier):
        return None
    spec = given.spec
    mask, valid = spec.mask, spec.mask.key_valid
    if any(x is not None for x in (mask.rule, mask.allowed, mask.added, mask.indices)):
        return None
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    return Seen(spec.offset + given.shape[2] - 1 - spec.j0, spec.j0, mask.left, mask.right, valid)


def past_length(kwargs: dict) -> int:
    """Tokens already in the cache a forward was given."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = kwargs.get("cache_params")
    length = getattr(cache, "get_seq_length", None)
    try:
        return int(length()) if length is not None else 0
    except (TypeError, ValueError, IndexError):
        return 0


def describe(
    frame: Frame, cross: bool, causal: bool, q: Tensor, k: Tensor, v: Tensor, given: Any, kwargs: dict[str, Any]
) -> AttentionCall:
    """An AttentionCall from what transformers hands over; its order of score operations is the contract's."""
    scale = kwargs.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    keys, queries = k.shape[2], q.shape[2]
    bias = kwargs.get("position_bias")
    if isinstance(bias, Tensor) and bias.shape[-1] > keys:
        bias = bias[..., :keys]
    mask, offset, j0, valid = read_mask(frame, given, q, keys, queries)
    if cross:
        # The mask knows the keys (another sequence) and how they are padded; the queries go on from the cache.
        offset, valid = frame.past, None
    if given is None and causal and queries > 1:
        mask.right = 0
        offset = keys - queries
    indices = kwargs.get("indices")
    if isinstance(indices, Tensor):
        mask = replace(mask, indices=indices.long())
    i, host_i = frame.positions(offset, queries, q.device)
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        scale=scale,
        mask=mask,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        bias=bias,
        i=i,
        j0=j0,
        query_valid=valid,
        host_i=host_i,
    )


def read_mask(frame: Frame, given: Any, q: Tensor, keys: int, queries: int) -> tuple[Mask, int, int, Tensor | None]:
    """A mask in any form a model hands over: None, our carrier, a bool or additive tensor, a BlockMask."""
    batch = q.shape[0]
    if given is None:
        return Mask(batch=batch), frame.past, 0, None
    if isinstance(given, Carrier):
        spec = given.spec
        mask = fitted(spec.mask, keys, batch)
        rows = given.shape[2]
        start = spec.offset + rows - queries if rows >= queries else spec.offset
        return mask, start, spec.j0, frame.valid(spec.padding, start, queries, batch)
    if not isinstance(given, Tensor):
        mod = getattr(given, "mask_mod", None)
        if mod is None:
            raise HeadwiseError(f"The attention mask is a {type(given).__name__}, which headwise can't read.")
        return Mask(rule=mod, vmap=True, batch=batch), frame.past, 0, None
    mask = Mask(batch=batch)
    tensor = given if given.ndim == 4 else given[None] if given.ndim == 3 else given[None, None]
    tensor = tensor[..., :keys]
    if tensor.dtype == torch.bool:
        mask.allowed = tensor
    else:
        mask.added = tensor
    return mask, frame.past, 0, None


def fitted(mask: Mask, keys: int, batch: int) -> Mask:
    """A carrier's mask for a layer whose keys are fewer or more than were asked for (evicted, shared, beams)."""
    if mask.key_valid is not None and mask.key_valid.shape[1] != keys:
        if mask.key_valid.shape[1] < keys:
            raise HeadwiseError(
                f"A layer has {keys} keys, but the padding mask knows {mask.key_valid.shape[1]}: pass an "
                "attention_mask for all of them."
            )
        return Mask(mask.left, mask.right, mask.key_valid[:, :keys], mask.rule, mask.vmap, batch=batch)
    return mask


def query_validity(padding: Tensor | None, start: int, queries: int, batch: int) -> Tensor | None:
    """Which queries are tokens and not padding, as far as the padding mask reaches."""
    if padding is None or padding.ndim != 2 or padding.shape[1] < start + queries or padding.shape[0] != batch:
        return None
    valid = padding[:, start : start + queries]
    return None if bool(valid.all()) else valid
