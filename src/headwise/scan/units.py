"""Units two models can be compared by: tokens, or the words both read, however each of them splits them.

Attention *to* a word is the sum over its pieces, attention *from* a word the mean over them, so that rows still sum to
1; a vector of a word is the mean over its pieces (Clark et al., 2019).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.models.inputs import kind_of
from headwise.models.tokens import offsets

Unit = Literal["token", "word"]
Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Units:
    """The unit each token of a stream belongs to (-1: none, such as [CLS] among words)."""

    of: Int[Tensor, " token"]
    count: int

    def sums(self, x: Float[Tensor, "... token"]) -> Float[Tensor, "... unit"]:
        """Values of tokens added up per unit."""
        return x @ self._members(x)

    def means(self, x: Float[Tensor, "... token dim"]) -> Float[Tensor, "... unit dim"]:
        """Vectors of tokens averaged per unit."""
        members = self._members(x)
        return (members / members.sum(0)).T @ x

    def part(self, chosen: Int[Tensor, " some"]) -> tuple[Int[Tensor, " row"], Units]:
        """The tokens of some units, and which of these units each is in."""
        tokens = torch.isin(self.of, chosen).nonzero().flatten()
        place = torch.full((self.count,), -1)
        place[chosen] = torch.arange(len(chosen))
        return tokens, Units(place[self.of[tokens]], len(chosen))

    def _members(self, x: Tensor) -> Float[Tensor, "token unit"]:
        inside = self.of.to(x.device)[:, None] == torch.arange(self.count, device=x.device)
        return inside.to(x.dtype)


def find_units(opened: Opened, given: Any, tokens: int, unit: Unit) -> Units:
    """The units of one input. As tokens: all of them, but only the frames that hold sound where a sound was padded.
    As words: what white space separates, special tokens left out."""
    if unit == "word":
        if not isinstance(given, str):
            raise HeadwiseError(f"unit: words are those of a text; got a {type(given).__name__}.")
        return word_units(opened, given, [m.span() for m in re.finditer(r"\S+", given)])
    if unit != "token":
        raise HeadwiseError(f'unit: wanted "token" or "word"; got {unit!r}.')
    count = heard(opened, given, tokens)
    return Units(torch.where(torch.arange(tokens) < count, torch.arange(tokens), -1), count)


def word_units(opened: Opened, text: str, spans: list[Span]) -> Units:
    """Which word (a span of characters) each token of a text is a piece of."""
    if opened.tokenizer is None:
        raise HeadwiseError(f"unit: {opened.name} has no tokenizer, so the words of a text cannot be found.")
    _, places = offsets(text, opened.tokenizer)
    of, word = [], 0
    for start, stop in places:
        while word < len(spans) - 1 and spans[word][1] <= start:
            word += 1
        inside = word < len(spans) and stop > start and stop > spans[word][0] and start < spans[word][1]
        of.append(word if inside else -1)
    missing = sorted(set(range(len(spans))) - set(of))
    if missing:
        a, b = spans[missing[0]]
        raise HeadwiseError(f"{opened.name} has no token of its own for the word {text[a:b]!r}: use unit='token'.")
    return Units(torch.tensor(of), len(spans))


def heard(opened: Opened, given: Any, tokens: int) -> int:
    """How many frames of a padded sound hold sound; any other input counts in full."""
    extractor = getattr(opened.processor, "feature_extractor", opened.processor)
    whole = getattr(extractor, "n_samples", None)
    if not isinstance(whole, int) or isinstance(given, dict) or kind_of(given) != "audio":
        return tokens
    return min(tokens, max(1, math.ceil(len(given) / whole * tokens)))


def encode_one(opened: Opened, given: Any) -> dict[str, Tensor]:
    """One input as a batch of one."""
    batch = opened.encode(given)
    size = next(iter(batch.values())).shape[0]
    if size != 1:
        raise HeadwiseError(f"inputs: wanted a list with one text, picture or sound an entry; got {size} in one entry.")
    return batch


def main_stream(opened: Opened, batch: dict[str, Tensor], stream: str | None) -> str:
    """The stream asked for; else the text of an input of token ids, else the model's first."""
    if stream is None:
        return "text" if "text" in opened.streams and "input_ids" in batch else opened.streams[0]
    if stream not in opened.streams:
        raise HeadwiseError(f"stream: {opened.name} has {', '.join(opened.streams)}; got {stream!r}.")
    return stream
