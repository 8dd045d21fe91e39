"""Segments: a name for every token, so that readings and edits can speak of "system", "document 3" or "image".

Labels are numbers into `names`, one per token, for one sequence `[token]` or for a batch `[batch, token]`.
Relative kinds ("self", "previous", "window:8", ...) depend on the query as well, so they are names that readings and
edits understand and never labels; "first" may be both, as it is the same thing either way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwise.errors import HeadwiseError

SAME = "same"
RELATIVE = ("self", "previous", "next", "first", SAME, "window:W")
"""Kinds that depend on the query as well: "first" is key 0, "same" the keys of the query's own segment, "window:8" is
|i - j| <= 8."""

Span = tuple[int, int]
Spans = Mapping[str, "Span | Sequence[Span]"]


def window_size(name: str) -> int | None:
    """The w of "window:w" (keys with |i-j| <= w), or None for any other name."""
    found = re.fullmatch(r"window:(\d+)", name)
    return int(found[1]) if found else None


def is_relative(name: str) -> bool:
    """Whether `name` is a relative kind, such as "self" or "window:8"."""
    return name in RELATIVE[:5] or window_size(name) is not None


@dataclass(frozen=True, eq=False)
class Segments:
    """A name for every token.

    >>> print(Segments.from_spans({"question": (2, 4)}, length=6))
    segment   tokens  where
    question       2  2-3
    rest           4  0-1, 4-5
    """

    names: tuple[str, ...]
    labels: Int[Tensor, "*batch token"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        labels = torch.as_tensor(self.labels)
        object.__setattr__(self, "labels", labels)
        if labels.dim() not in (1, 2) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise HeadwiseError(
                f"labels: wanted whole numbers of shape [token] or [batch, token], got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        if len(set(self.names)) != len(self.names):
            raise HeadwiseError(f"names: every segment needs a name of its own, got {list(self.names)}.")
        for name in self.names:
            if is_relative(name) and name != "first":
                raise HeadwiseError(f"names: {name!r} is a relative kind and cannot be the label of a token.")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.names):
            raise HeadwiseError(
                f"labels: wanted numbers from 0 to {len(self.names) - 1} (one per name), got "
                f"{int(labels.min())} to {int(labels.max())}."
            )

    # -- looking -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @property
    def length(self) -> int:
        """How many tokens are labelled."""
        return self.labels.shape[-1]

    def index(self, name: str) -> int:
        """The number of a segment."""
        if name not in self.names:
            raise HeadwiseError(f"segment {name!r} is not there; this input has {', '.join(self.names)}.")
        return self.names.index(name)

    def mask(self, name: str) -> Bool[Tensor, "*batch token"]:
        """True at the tokens of one segment."""
        return self.labels == self.index(name)

    def validate(self, n_tokens: int) -> Segments:
        """This object again, if it labels exactly `n_tokens` tokens."""
        if self.length != n_tokens:
            raise HeadwiseError(
                f"segments: labels for {self.length} tokens, but the input has {n_tokens}; build them from the same "
                "text and tokenizer."
            )
        return self

    def to(self, device: torch.device | str) -> Segments:
        return Segments(self.names, self.labels.to(device))

    def __str__(self) -> str:
        lines = [("segment", "tokens", "where")]
        for i, name in enumerate(self.names):
            hit = self.labels == i
            where = ranges(hit if hit.dim() == 1 else hit[0])
            lines.append((name, str(int(hit.sum())), where + (" (first of the batch)" if hit.dim() == 2 else "")))
        wide = max(len(line[0]) for line in lines)
        return "\n".join(f"{a:<{wide}}  {b:>6}  {c}".rstrip() for a, b, c in lines)

    # -- changing ----------------------------------------------------------------------------------------------------

    def extend(self, length: int, name: str = "generated") -> Segments:
        """Labels for `length` tokens in all: what comes after the present end is called `name`."""
        more = length - self.length
        if more <= 0:
            return self
        names = self.names if name in self.names else (*self.names, name)
        new = self.labels.new_full((*self.labels.shape[:-1], more), names.index(name))
        return Segments(names, torch.cat([self.labels, new], dim=-1))

    @classmethod
    def stack(cls, each: Sequence[Segments], length: int | None = None, left: bool = False) -> Segments:
        """Several sequences as one batch; shorter ones are filled with "pad" on one side."""
        length = length or max(one.length for one in each)
        names: list[str] = []
        for one in each:
            names += [name for name in one.names if name not in names]
        if any(one.length < length for one in each) and "pad" not in names:
            names.append("pad")
        rows = []
        for one in each:
            if one.labels.dim() != 1 or one.length > length:
                raise HeadwiseError(f"stack: wanted single sequences of at most {length} tokens.")
            here = torch.tensor([names.index(name) for name in one.names])[one.labels.cpu().long()]
            fill = torch.full((length - one.length,), names.index("pad") if one.length < length else 0)
            rows.append(torch.cat([fill, here] if left else [here, fill]))
        return cls(tuple(names), torch.stack(rows))

    # -- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_spans(cls, spans: Spans, length: int, rest: str = "rest") -> Segments:
        """Token spans `(start, end)`, end not included; tokens in none are called `rest`."""
        labels = torch.full((length,), -1)
        for number, (name, given) in enumerate(spans.items()):
            for start, end in as_list(given):
                if not 0 <= start <= end <= length:
                    raise HeadwiseError(f"{name}: the span ({start}, {end}) does not fit in {length} tokens.")
                if (labels[start:end] >= 0).any():
                    other = list(spans)[int(labels[start:end].max())]
                    raise HeadwiseError(f"{name}: the span ({start}, {end}) overlaps segment {other!r}.")
                labels[start:end] = number
        names = tuple(spans)
        if (labels < 0).any():
            names = names if rest in names else (*names, rest)
            labels[labels < 0] = names.index(rest)
        return cls(names, labels)

    @classmethod
    def positions(cls, length: int) -> Segments:
        """Only the place is known: "first" and "rest"."""
        return cls.from_spans({"first": (0, min(1, length))}, length)

    @classmethod
    def from_characters(cls, text: str, spans: Spans, encoding: Any, rest: str = "rest") -> Segments:
        """Character spans of `text`; a token belongs to the span that covers most of its characters.

        `encoding` is a fast tokenizer, or what it returned for `text`.
        """
        from headwise.models import tokens

        return tokens.by_characters(cls, text, spans, encoding, rest)

    @classmethod
    def from_chat(
        cls, tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **kw: Any
    ) -> tuple[dict[str, Tensor], Segments]:
        """The model inputs of a conversation, and the role that said each token ("template" for the frame)."""
        from headwise.models import tokens

        return tokens.from_chat(cls, tokenizer, messages, add_generation_prompt, **kw)

    @classmethod
    def from_documents(
        cls,
        tokenizer: Any,
        docs: Sequence[str] | Mapping[str, str],
        before: str = "",
        after: str = "",
        separator: str = "\n\n",
    ) -> tuple[dict[str, Tensor], Segments]:
        """The model inputs of several documents in one prompt: "before", "document 1", ..., "after"."""
        from headwise.models import tokens

        return tokens.from_documents(cls, tokenizer, docs, before, after, separator)

    @classmethod
    def from_special(cls, tokenizer: Any, ids: Int[Tensor, "*batch token"], rest: str = "rest") -> Segments:
        """The tokenizer's special tokens by their roles ("bos", "cls", "sep", "pad", ...), all else `rest`."""
        from headwise.models import tokens

        return tokens.by_special(cls, tokenizer, ids, rest)

    @classmethod
    def from_processor(cls, processor: Any, inputs: Mapping[str, Any], rest: str = "text") -> Segments:
        """The places a multimodal processor kept for "image", "video" and "audio" tokens, beside special tokens."""
        from headwise.models import tokens

        return tokens.by_processor(cls, processor, inputs, rest)


def as_list(spans: Span | Sequence[Span]) -> list[Span]:
    """One span or several, as several."""
    if len(spans) == 2 and all(isinstance(end, int) for end in spans):
        return [(int(spans[0]), int(spans[1]))]  # type: ignore[call-overload, arg-type]
    return [(int(start), int(end)) for start, end in spans]  # type: ignore[misc]


def ranges(hit: Bool[Tensor, " token"], most: int = 4) -> str:
    """True places as "0-1, 4-5"."""
    edges = torch.diff(hit.int(), prepend=hit.new_zeros(1).int(), append=hit.new_zeros(1).int())
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    parts = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(parts[:most]) + (f", ... ({len(parts)} runs)" if len(parts) > most else "")
