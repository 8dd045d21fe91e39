"""Names for places of a prompt that methods speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from headwise.attention import Edit
from headwise.errors import HeadwiseError
from headwise.models import Segments

LAST = "last"


def speak_of(edits: Sequence[Edit], name: str) -> bool:
    """Whether edits mean the tokens of a segment."""
    parts = [getattr(edit, part, None) for edit in edits for part in ("keys", "queries", "tokens")]
    parts += [group for edit in edits for group in getattr(edit, "groups", ())]
    return any(isinstance(part, str) and part == name for part in parts)


def mark_last(batch: Mapping[str, Any], segments: Segments | None = None) -> Segments:
    """The segments of a prompt (None: no others) with its last token, padding aside, called "last". "generated" is a
    name from the start, so that a method may speak of tokens that are still to come."""
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise HeadwiseError('batch: wanted model inputs with "input_ids" of shape [batch, token].')
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    place = torch.arange(ids.shape[1], device=ids.device)
    last = (place * mask).argmax(-1)
    known = segments or Segments(("rest",), torch.zeros(ids.shape[1], dtype=torch.long))
    known.validate(ids.shape[1])
    labels = known.labels.to(ids.device).expand(ids.shape).clone()
    names = (*known.names, *(name for name in (LAST, "generated") if name not in known.names))
    labels[torch.arange(len(ids), device=ids.device), last] = names.index(LAST)
    return Segments(names, labels)
