"""Which heads look at earlier copies of the token, at earlier pieces of the word, at rare tokens?

What a head sees by position alone is taken off. For copies and pieces: query i looks at keys i - l; another query i' of
the same text, for which i' - l is neither, is read at the same distances l, and

    score = mean_i sum_l a[i, i - l]  -  mean_i' sum_l a[i', i' - l].

For rare tokens (the tenth of a text's words with the highest ids: vocabularies are sorted by frequency) the same number
of other words, each the nearest after a rare one, are read beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention.readings import At, Propagate, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question

COPIES, PIECES = 8, 4
"""So many earlier copies, and pieces of a word, are followed back from a token."""
MARKERS = ("Ġ", "▁", "##")


@dataclass(frozen=True)
class TextRoles(Question):
    """`text_roles` is the largest of the others: `repeated_token`, `word_pieces`, `rare_tokens`, each beyond what the
    head's habits of distance explain. Only words count, no punctuation. A column is unknown where a text has no such
    tokens (or a vocabulary no pieces)."""

    first_seed: int = 0
    threshold: float = 0.3  # type: ignore[misc]
    paper: ClassVar[Paper] = Paper("A Multiscale Visualization of Attention in the Transformer Model", "1906.05714")

    def columns(self) -> tuple[Column, ...]:
        rows = [
            ("text_roles", "Roles in a text", "The largest of the next three.", "looks for words, not for places"),
            (
                "repeated_token",
                "Repeated tokens",
                "Attention to earlier copies of the word.",
                "looks for the same word",
            ),
            (
                "word_pieces",
                "Pieces of the word",
                "Attention to earlier pieces of the same word.",
                "puts words together",
            ),
            ("rare_tokens", "Rare tokens", "Attention to the text's rarest tenth of words.", "looks for rare words"),
        ]
        beyond = "beyond what distance explains"
        return tuple(
            Column(name, title, f"{what[:-1]}, {beyond}." if n else what, "share of attention", high, self.threshold)
            for n, (name, title, what, high) in enumerate(rows)
        )

    def lacks(self, opened: Opened) -> str | None:
        text = any(site.stream == "text" and site.kind == "self" for site in opened.sites)
        return None if text and opened.tokenizer is not None else "a model that reads text, with its tokenizer"

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        ids = prompt.inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape[0] != 1:
            raise HeadwiseError("TextRoles reads one text at a time: give a list of texts, each an input of its own.")
        pieces = opened.tokenizer.convert_ids_to_tokens(ids[0].tolist())
        words = [is_word(piece) for piece in pieces]
        found: list[Reading] = []
        patterns = {"repeated": copies(ids[0].tolist(), words), "pieces": word_starts(pieces, words)}
        for name, lags in patterns.items():
            rng = np.random.default_rng(self.first_seed)
            for called, chosen in ((name, lags), (f"{name}_control", control(lags, len(pieces), rng))):
                if chosen:
                    targets = table(chosen, len(pieces)).to(ids.device)
                    found.append(At(targets=targets, queries=sorted(chosen), per="head", stream="text", name=called))
        marks = rare(ids[0].tolist(), words)
        if marks is not None:
            found.append(Propagate(marks.to(ids.device), per="head", stream="text", name="rare"))
        return found

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        kept = {}
        for name in ("repeated", "pieces"):
            if name in values and f"{name}_control" in values:
                beyond = values[name].sum("target") - values[f"{name}_control"].sum("target")
                kept |= {name: beyond, f"{name}_count": values[f"{name}_count"].max("target")}
        if "rare" in values:
            kept["rare"] = values["rare"].isel(column=0, drop=True) - values["rare"].isel(column=1, drop=True)
        return xr.Dataset(kept)

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {"repeated": "repeated_token", "pieces": "word_pieces", "rare": "rare_tokens"}
        found = {column: values[name] for name, column in names.items() if name in values}
        return {"text_roles": xr.concat(list(found.values()), "of").max("of"), **found}


def is_word(piece: str | None) -> bool:
    """Whether a token is (a part of) a word or number."""
    bare = (piece or "").lstrip("Ġ▁#")
    if bare[:1] in ("Ċ", "ĉ", "č"):  # how byte-level vocabularies write line breaks and tabs
        return False
    return bool(bare) and all(c.isalnum() or c in "'’" for c in bare)


def copies(ids: list[int], words: list[bool]) -> dict[int, list[int]]:
    """For every word that was there before: how far back its last copies are."""
    seen: dict[int, list[int]] = {}
    lags: dict[int, list[int]] = {}
    for place, (token, word) in enumerate(zip(ids, words, strict=True)):
        if not word:
            continue
        if token in seen:
            lags[place] = [place - before for before in seen[token][-COPIES:]]
        seen.setdefault(token, []).append(place)
    return lags


def word_starts(pieces: list[str], words: list[bool]) -> dict[int, list[int]]:
    """For every token that goes on with a word: how far back the word's earlier pieces are. None where the vocabulary
    marks neither beginnings nor continuations."""
    if not any(piece.startswith(MARKERS) for piece in pieces if piece):
        return {}
    goes_on = any(piece.startswith("##") for piece in pieces)
    lags: dict[int, list[int]] = {}
    start = 0
    for place, piece in enumerate(pieces):
        continued = piece.startswith("##") if goes_on else not piece.startswith(("Ġ", "▁"))
        if place == 0 or not (continued and words[place] and words[place - 1]):
            start = place
        elif place > start:
            lags[place] = list(range(1, min(place - start, PIECES) + 1))
    return lags


def control(lags: dict[int, list[int]], length: int, rng: np.random.Generator) -> dict[int, list[int]]:
    """For every query of a pattern another one, used once, that looks back as far without finding the pattern."""
    pairs = {(place, lag) for place, some in lags.items() for lag in some}
    free = rng.permutation(length).tolist()
    found: dict[int, list[int]] = {}
    for place in rng.permutation(sorted(lags)).tolist():
        some = lags[place]
        fits = (n for n in free if n != place and n >= max(some) and not any((n, lag) in pairs for lag in some))
        other = next(fits, None)
        if other is not None:
            free.remove(other)
            found[other] = some
    return found


def table(lags: dict[int, list[int]], length: int) -> Int[Tensor, "token target"]:
    """The keys of every query, -1 where there is none; as wide for every pattern, so that they can be read together."""
    found = torch.full((length, max(COPIES, PIECES)), -1)
    for place, some in lags.items():
        found[place, : len(some)] = place - torch.tensor(some)
    return found


def rare(ids: list[int], words: list[bool]) -> Float[Tensor, "token 2"] | None:
    """Marks of the rarest tenth of words, and of as many others, each the nearest free one after a rare one."""
    places = [place for place, word in enumerate(words) if word]
    count = len(places) // 10
    if count == 0:
        return None
    rarest = sorted(places, key=lambda place: -ids[place])[:count]
    free = [place for place in places if place not in set(rarest)]
    marks = torch.zeros(len(ids), 2)
    marks[rarest, 0] = 1
    for place in sorted(rarest):
        beside = next((other for other in free if other > place), None) or free[-1]
        free.remove(beside)
        marks[beside, 1] = 1
    return marks
