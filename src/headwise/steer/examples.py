"""Solved prompts, which methods are calibrated on, and the JSON lines they come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.steer.choices import Choice
from headwise.steer.prompts import mark_last


@dataclass(frozen=True)
class Example:
    """A prompt with its right answer, which is continued text, leading space included. `options` are all answers to
    choose from (none: those of all examples together); `spans` name parts of the prompt, by characters."""

    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(text and isinstance(text, str) for text in (self.prompt, self.answer)):
            raise HeadwiseError(f"Example wants a prompt and an answer; got {self.prompt!r} and {self.answer!r}.")
        if isinstance(self.options, str) or (self.options and self.answer not in self.options):
            raise HeadwiseError(
                f"Example(options=...) must be a list that holds the answer {self.answer!r}; got {self.options!r}."
            )

    @classmethod
    def of(cls, given: Example | Choice) -> Example:
        """A Choice (with its spans, where it has some) as an example."""
        if isinstance(given, Example):
            return given
        if not isinstance(given, Choice) or given.gold is None:
            raise HeadwiseError(f"examples: wanted Examples, or Choices whose gold is known; got {given!r}.")
        return cls(given.prompt, given.options[given.gold], given.options, getattr(given, "spans", {}))

    def segments(self, opened: Opened) -> Segments:
        """The parts as segments, the last token of the prompt as "last"."""
        named = Segments.from_characters(self.prompt, self.spans, opened.tokenizer)
        return mark_last(opened.encode(self.prompt), named)


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Examples from JSON lines: "prompt", "answer", and if wanted "options" (a list) and "segments": names with the
    words of the prompt they stand for, or with [start, end] in characters."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HeadwiseError(f"examples: {path} cannot be read ({error}).") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            spans = {name: span(row["prompt"], words) for name, words in row.get("segments", {}).items()}
            options = row.get("options", ())
            found.append(
                Example(row["prompt"], row["answer"], options if isinstance(options, str) else tuple(options), spans)
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HeadwiseError(
                f'examples: line {number} of {path} is none with "prompt" and "answer" ({error}).'
            ) from None
    if not found:
        raise HeadwiseError(f"examples: {path} holds none.")
    return found


def span(prompt: str, words: str | Sequence[int]) -> tuple[int, int]:
    """Where words stand in a prompt, or the place given."""
    if isinstance(words, str):
        start = prompt.find(words)
        if start < 0 or not words:
            raise HeadwiseError(f"examples: {words!r} does not stand in the prompt {prompt[:40]!r}.")
        return start, start + len(words)
    start, stop = words
    return int(start), int(stop)
