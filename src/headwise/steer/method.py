"""What a steering method is, and how several are put on a model and taken off again.

A method is a frozen dataclass that says what it changes: `edits` of attention calls, and for the residual stream
beside them `hooks`. One that must look before it acts is made ready by a second method that returns a new method
(`calibrate(opened, examples)`, or `prepare(opened, batch)` for one that looks at the prompt itself).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention import Edit, Run, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments, open_model
from headwise.paper import Paper
from headwise.patterns import HeadPattern
from headwise.steer.prompts import FIRST, LAST, check_first, speak_of
from headwise.steer.settings import Heads, check_settings

Space = Mapping[str, Sequence[Any]]
"""Settings with the values to try."""


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass gives `paper`, `what` (one line for lists), and `edits` or `hooks`."""

    paper: ClassVar[Paper] = Paper("", "")
    what: ClassVar[str] = ""
    space: ClassVar[Space] = {}
    """Settings that `steer.calibrate` searches, with the values it tries: the one that changes nothing first."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def name(self) -> str:
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def lacks(self, opened: Opened) -> str | None:
        """What the model would need for this method, or None when it has it."""
        return None

    def prepare(self, opened: Opened, batch: Mapping[str, Any]) -> Self:
        """The method made ready for one prompt; a method that does not look at prompts is ready as it is."""
        return self

    def answering(self, rows: int) -> Self:
        """The method for a text that holds an answer already, as it is scored: the last `rows` queries write it, each
        of which would be the last of its own forward pass if the model wrote it."""
        return self

    def edits(self, opened: Opened) -> list[Edit]:
        """The changes of attention calls. A setting that changes nothing gives none, so that the model stays bit-equal
        to itself."""
        return []

    def hooks(self, opened: Opened) -> AbstractContextManager[None]:
        """What has to be changed beside attention."""
        return nullcontext()


@contextmanager
def apply(
    model: Opened | nn.Module,
    *methods: Method,
    segments: Segments | Mapping[str, Segments] | None = None,
) -> Iterator[Run]:
    """Steers every forward pass inside the block, also those of `generate()`, and leaves the model as it was.

    Methods stack: edits of one kind apply in the order the methods are given; the kinds themselves in the fixed order
    Shift, Rebase, ScoreMap, ScoreBias, Reweight, Blend, HeadGain. `segments` name the prompt's tokens; what is
    generated after them is called "generated".

    >>> with steer.apply(opened, steer.TokenScale(gain=2.0), steer.ScaleHeads(heads=[(3, 1)], gain=0.0)):
    ...     opened.model.generate(**batch)
    """
    opened = model if isinstance(model, Opened) else open_model(model)
    if not methods:
        raise HeadwiseError("apply: give at least one method, such as steer.TokenScale(gain=2.0).")
    if segments is not None and not isinstance(segments, Segments | Mapping):
        raise HeadwiseError(f"apply: segments= must be Segments, or a mapping of streams to them; got {segments!r}.")
    strange = [name for name in segments if name not in opened.streams] if isinstance(segments, Mapping) else []
    if strange:
        raise HeadwiseError(
            f"apply: segments= names streams {', '.join(strange)}; {opened.name} has {', '.join(opened.streams)}."
        )
    edits: list[Edit] = []
    for method in methods:
        if not isinstance(method, Method):
            raise HeadwiseError(f"apply: wanted steering methods such as steer.TokenScale(); got {method!r}.")
        reason = method.lacks(opened)
        if reason is not None:
            raise HeadwiseError(f"apply: {method.name} needs {reason}; {opened.name} does not have that.")
        edits += method.edits(opened)
    with ExitStack() as stack:
        run = stack.enter_context(attend(opened, edits=edits, segments=segments))
        named = {name for known in run.segments.values() for name in known}
        if speak_of(edits, LAST) and LAST not in named:
            raise HeadwiseError(
                "apply: a method means the prompt's last token: give segments=steer.mark_last(batch), or with segments "
                "of your own, steer.mark_last(batch, segments)."
            )
        if speak_of(edits, FIRST) and FIRST not in named:
            stack.callback(opened.model.register_forward_pre_hook(check_first, with_kwargs=True).remove)
        for method in methods:
            stack.enter_context(method.hooks(opened))
        yield run


def pairs(heads: Heads, opened: Opened) -> list[tuple[int, int]] | None:
    """The heads as (layer, head) pairs, checked against the model; None for all."""
    if heads is None:
        return None
    if isinstance(heads, HeadPattern):
        heads.check(opened.fingerprint, opened.name)
        return heads.pairs(stream="text" if any(h.stream == "text" for h in heads.heads) else None)
    chosen = [(int(layer), int(head)) for layer, head in heads]
    if not chosen:
        raise HeadwiseError("heads: wanted at least one (layer, head) pair, or None for all heads; got none.")
    every = set(every_head(opened))
    for pair in chosen:
        if pair not in every:
            layers, heads = zip(*every, strict=True)
            raise HeadwiseError(
                f"heads: wanted (layer, head) pairs of {opened.name}, which has layers {min(layers)} to {max(layers)} "
                f"with heads 0 to {max(heads)}; got {pair}."
            )
    return chosen


def by_layer(chosen: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """(layer, head) pairs as layer -> heads, in the order of the layers."""
    return {layer: sorted(h for at, h in chosen if at == layer) for layer in sorted({layer for layer, _ in chosen})}


def every_head(opened: Opened, stream: str | None = None) -> list[tuple[int, int]]:
    """All (layer, head) pairs of a stream (None: the text, or the model's first)."""
    stream = stream or ("text" if "text" in opened.streams else opened.streams[0])
    return [(site.layer, head) for site in opened.sites if site.stream == stream for head in range(site.heads)]


def check_per_head(setting: str, given: Float[Tensor, "layer head *rest"], opened: Opened) -> None:
    """Raises unless a tensor has a row for every layer and head of the model."""
    wanted = tuple(1 + max(column) for column in zip(*every_head(opened), strict=True))
    if given.shape[:2] != wanted or not given.isfinite().all():
        raise HeadwiseError(
            f"{setting} must hold finite numbers for the {wanted[0]} layers and {wanted[1]} heads of {opened.name}; "
            f"got shape {tuple(given.shape)}."
        )
