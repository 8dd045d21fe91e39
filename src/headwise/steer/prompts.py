"""Names for places of a prompt that methods speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headwise.attention import Edit
from headwise.errors import HeadwiseError
from headwise.models import Segments

LAST = "last"
FIRST = "first"


def speak_of(edits: Sequence[Edit], name: str) -> bool:
    """Whether edits mean the tokens of a segment."""
    parts = [getattr(edit, part, None) for edit in edits for part in ("keys", "queries", "tokens")]
    parts += [group for edit in edits for group in getattr(edit, "groups", ())]
    return any(isinstance(part, str) and part == name for part in parts)


def mark_last(batch: Mapping[str, Any], segments: Segments | None = None) -> Segments:
    """The segments of a prompt (None: no others) with its last token, padding aside, called "last". "generated" is a
    name from the start, so that a method may speak of tokens that are still to come."""
    mask = real(batch)
    place = torch.arange(mask.shape[1], device=mask.device)
    return marked((place * mask).argmax(-1), mask, segments, (LAST, "generated"))


def mark_first(batch: Mapping[str, Any], segments: Segments | None = None) -> Segments:
    """The segments of a prompt (None: no others) with its first token, padding aside, called "first". In a batch that
    is padded on the left, as for `generate()`, position 0 is padding for the shorter samples."""
    mask = real(batch)
    return marked(mask.long().argmax(-1), mask, segments, (FIRST,))


def real(batch: Mapping[str, Any]) -> Int[Tensor, "batch token"]:
    """1 at the tokens of a batch, 0 at padding."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise HeadwiseError('batch: wanted model inputs with "input_ids" of shape [batch, token].')
    mask = batch.get("attention_mask")
    return torch.ones_like(ids) if mask is None else mask


def marked(
    place: Int[Tensor, " batch"], mask: Int[Tensor, "batch token"], segments: Segments | None, names: tuple[str, ...]
) -> Segments:
    """The segments with one token of every sample called by the first of these names; the others are names beside."""
    known = segments or Segments(("rest",), torch.zeros(mask.shape[1], dtype=torch.long))
    known.validate(mask.shape[1])
    labels = known.labels.to(mask.device).expand(mask.shape).clone()
    every = (*known.names, *(name for name in names if name not in known.names))
    labels[torch.arange(len(mask), device=mask.device), place] = every.index(names[0])
    return Segments(every, labels)


def padded_left(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a forward is given a batch in which position 0 is padding."""
    mask = kwargs.get("attention_mask")
    long = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > 1
    ids = kwargs.get("input_ids", args[0] if args else None)
    # A step of decoding is not looked at: the prompt was.
    return long and (ids is None or ids.shape[1] > 1) and not bool(mask[:, 0].all())


def check_first(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook for methods that mean position 0 by "first": refuses a batch in which that is padding."""
    if padded_left(args, kwargs):
        raise HeadwiseError(
            "A method means the first token, but this batch is padded on the left: give apply "
            "segments=steer.mark_first(batch), which finds it in every sample."
        )
