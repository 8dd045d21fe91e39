"""Contextual heads: which heads look at the document that holds the answer while the answer is written?

K documents, one of which answers a question, then the answer. Of every head: the mass its answer tokens give to the
relevant document, to all others together, to the one of them that gets most, and to the sink (the first two tokens).
`score = mean over prompts of mean over answer tokens i of sum_{j in document} a_ij`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import xarray as xr

from headwise.attention.readings import Mass, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.paper import Paper
from headwise.scan.basin import AttentionBasin, text_segments
from headwise.scan.question import Column, Prompt, Question

SINK = 2
"""Tokens at the beginning that are taken for the sink."""


@dataclass(frozen=True)
class ContextualHeads(Question):
    """`contextual_heads`: mass on the relevant document; beside it `context_others`, `context_other_max` and
    `context_sink`. The facts are invented, of equal form, and asked for at every place as often. The answer is the
    right one, its own tokens are the queries; the paper takes what the model answers."""

    documents: int = 8
    prompts_asked: int = 16
    first_seed: int = 0
    paper: ClassVar[Paper] = Paper(
        "Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts", "2503.23306"
    )

    def __post_init__(self) -> None:
        if self.prompts_asked < 1:
            raise HeadwiseError(f"ContextualHeads(prompts_asked=...) must be at least 1; got {self.prompts_asked!r}.")
        self.shelves  # noqa: B018  # says what is wrong with documents=

    @property
    def shelves(self) -> AttentionBasin:
        """The same prompts as those of the basin."""
        return AttentionBasin(slots=self.documents)

    def columns(self) -> tuple[Column, ...]:
        rows = [
            ("contextual_heads", "Contextual heads", "the document that answers", "looks at the relevant text"),
            ("context_others", "Other documents", "all other documents", "looks at irrelevant text"),
            ("context_other_max", "One other document", "the other document that gets most", "is distracted by a text"),
            ("context_sink", "Sink while answering", "the first two tokens", "looks at no document"),
        ]
        return tuple(
            Column(name, title, f"While an answer is written, attention to {what}.", "share of attention", high)
            for name, title, what, high in rows
        )

    def lacks(self, opened: Opened) -> str | None:
        return self.shelves.lacks(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        return [self.prompt(opened, self.first_seed + n) for n in range(self.prompts_asked)]

    def prompt(self, opened: Opened, seed: int) -> Prompt:
        shelf = self.shelves.shelf(seed)
        start = self.shelves.prompt(opened, shelf).length
        whole = self.shelves.prompt(opened, shelf, f"{shelf.answer}.")
        segments = text_segments(whole)
        labels = segments.labels.clone()
        labels[:SINK] = len(segments.names)
        return Prompt(whole.inputs, {"text": Segments((*segments.names, "sink"), labels)}, own=(shelf.gold, start))

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        answer = range(prompt.own[1], text_segments(prompt).length)
        return [Mass((*self.shelves.names, "sink"), per="head", queries=answer, stream="text")]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        mass, gold = values["mass"], f"document {prompt.own[0] + 1}"
        others = mass.sel(segment=[name for name in self.shelves.names if name != gold])
        return xr.Dataset(
            {
                "relevant": mass.sel(segment=gold, drop=True),
                "others": others.sum("segment"),
                "other_max": others.max("segment"),
                "sink": mass.sel(segment="sink", drop=True),
            }
        )

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {
            "contextual_heads": "relevant",
            "context_others": "others",
            "context_other_max": "other_max",
            "context_sink": "sink",
        }
        found = {column: values[name] for column, name in names.items()}
        return found | {f"{column}_sem": values[f"{name}_sem"] for column, name in names.items()}
