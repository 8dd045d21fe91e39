"""Concept heads: the heads whose writing a concept's words explain, suppressed or enhanced.

A head's part in the residual stream, one row a sample at the last token of the prompt (or one for every token that the
model writes on), is pursued in the unembedding rows of the concept's tokens; the head's score is the variance they
explain. The outputs of the best heads are multiplied by alpha: -1 suppresses the concept, 5 enhances it, 0 ablates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from jaxtyping import Float

from headwise.attention import Edit, HeadGain
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.head_pursuit import head_pursuit, head_rows, unembedding
from headwise.steer.method import Heads, Method, every_head, pairs


@dataclass(frozen=True)
class ConceptHeads(Method):
    """Multiplies the outputs of `heads` (from `calibrate`) by `alpha` at all positions."""

    heads: Heads = None
    alpha: float = -1.0
    what: ClassVar[str] = "a concept's heads suppressed or enhanced"
    paper: ClassVar[Paper] = Paper(
        "Head Pursuit: Probing Attention Specialization in Multimodal Transformers", "2510.21518"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise HeadwiseError(f"ConceptHeads(alpha=...) must be a finite number; got {self.alpha!r}.")

    def edits(self, opened: Opened) -> list[Edit]:
        if self.alpha == 1:
            return []
        chosen = pairs(self.heads, opened)
        if chosen is None:
            raise HeadwiseError("ConceptHeads wants heads=: call calibrate(opened, prompts, words).")
        return [HeadGain(gain=self.alpha, heads=chosen)]

    def calibrate(
        self,
        opened: Opened,
        prompts: Sequence[str],
        words: Sequence[str],
        count: int = 8,
        steps: int = 50,
        tokens: int = 1,
        average: bool = False,
        center: bool = True,
    ) -> Self:
        """A copy for the `count` heads that the words explain best; other settings as in `concept_scores`."""
        every = every_head(opened)
        if not 1 <= count <= len(every):
            raise HeadwiseError(f"count: wanted 1 to {len(every)} heads; got {count}.")
        scores = concept_scores(opened, prompts, words, steps, tokens, average, center)
        best = sorted(every, key=lambda pair: -scores[pair])[:count]
        return replace(self, heads=tuple(sorted(best)))


def concept_scores(
    opened: Opened,
    prompts: Sequence[str],
    words: Sequence[str],
    steps: int = 50,
    tokens: int = 1,
    average: bool = False,
    center: bool = True,
) -> Float[np.ndarray, "layer head"]:
    """Explained variance, 0 to 1, of every head's writing at the prompts' last tokens, or (`tokens`, `average`) where
    the model writes on as `head_rows` has it; less the mean row with `center`, the released code's way. Random tokens
    explain much of a head that varies in few directions (those of a first layer): compare, or restrict the heads."""
    dictionary = unembedding(opened)[concept_tokens(opened, words)]
    rows = head_rows(opened, prompts, tokens=tokens, average=average)
    return head_pursuit(opened, rows, dictionary, steps, center=center)["explained"].values[..., -1]


def concept_tokens(opened: Opened, words: Sequence[str]) -> list[int]:
    """The tokens of words that are one token, with and without a leading space, as given and capitalised."""
    if not len(words) or isinstance(words, str) or opened.tokenizer is None:
        raise HeadwiseError(f"words: wanted a list of one or more words, and a model with a tokenizer; got {words!r}.")
    found: dict[int, None] = {}
    for word in words:
        for form in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
            ids = opened.tokenizer(form, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != opened.tokenizer.unk_token_id:
                found[ids[0]] = None
    if not found:
        raise HeadwiseError(f"words: none of {', '.join(list(words)[:5])} is one token of {opened.name}.")
    return list(found)
