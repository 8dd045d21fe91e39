"""Named relations between words, and those of their pairs a tokenizer can write with one token each."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from headwise.errors import HeadwiseError

Pairs = Sequence[tuple[str, str]]

RULES: dict[str, Callable[[str], str]] = {
    "same": lambda word: word,
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "year": lambda word: str(int(word) + 1),
}
"""Relations whose target follows from the source."""


@dataclass(frozen=True)
class Relation:
    """A list of (source, target) words. `copying`: the target is the source itself, which is easier to hit."""

    name: str
    phrase: str
    pairs: tuple[tuple[str, str], ...]
    copying: bool = False


@cache
def relations() -> dict[str, Relation]:
    """The relations that headwise ships, by name."""
    text = (files("headwise.scan") / "assets" / "word_pairs.toml").read_text(encoding="utf-8")
    found = {}
    for name, given in tomllib.loads(text).items():
        if "rule" in given:
            pairs = tuple((word, RULES[given["rule"]](word)) for word in given["words"].split())
        else:
            pairs = tuple((s, t) for s, t in (pair.split() for pair in given["pairs"].split(",")))
        found[name] = Relation(name, given["phrase"], pairs, given.get("copying", False))
    return found


def relation(name: str) -> Relation:
    if name not in relations():
        raise HeadwiseError(f"relations: there is none called {name!r}; there are {', '.join(relations())}.")
    return relations()[name]


def word_token(tokenizer: Any, word: str, leading_space: bool = True) -> int | None:
    """The one token that writes `word` (after a space), or None where the tokenizer needs several."""
    ids = tokenizer(f" {word}" if leading_space else word, add_special_tokens=False)["input_ids"]
    if leading_space and len(ids) > 1:  # SentencePiece puts a space in front by itself: the bare word bears its mark
        bare = tokenizer(word, add_special_tokens=False)["input_ids"]
        ids = bare if tokenizer.convert_ids_to_tokens(bare)[0].startswith("\u2581") else ids
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def single_tokens(tokenizer: Any, pairs: Pairs, leading_space: bool = True) -> list[tuple[int, int]]:
    """The pairs of which both words are one token, as token ids."""
    both = [tuple(word_token(tokenizer, word, leading_space) for word in pair) for pair in pairs]
    return [(s, t) for s, t in both if s is not None and t is not None]
