"""Small questions with known answers, from a seed: multiple choice, yes or no, and who gives what to whom.

The words are common ones. Where the parts of a prompt are among its tokens is found through the tokenizer's offsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from headwise.models import Opened
from headwise.scan.needs import lacks_language_model
from headwise.scan.question import Prompt

KINDS: Mapping[str, tuple[str, ...]] = {
    "an animal": ("dog", "horse", "cow", "sheep", "lion", "rabbit"),
    "a fruit": ("apple", "banana", "peach", "lemon", "cherry", "plum"),
    "a colour": ("red", "blue", "green", "yellow", "purple", "brown"),
    "a tool": ("hammer", "saw", "drill", "axe", "shovel", "knife"),
    "a country": ("France", "China", "Spain", "Brazil", "Egypt", "Canada"),
    "a part of the body": ("hand", "foot", "nose", "knee", "ear", "arm"),
}
NAMES = ("Mary", "John", "Tom", "Anna", "Peter", "Sarah", "James", "Alice", "Paul", "Laura", "David", "Emma")
GIFTS = ("a book", "a drink", "a ring", "a letter", "a key", "a cake")
PLACES = ("the store", "the park", "the school", "the station", "the office", "the garden")
LETTERS = "ABCD"
Parts = Sequence[tuple[str, str | None]]
"""Pieces of a prompt in order, each with the name of the part or None."""


def lacks(opened: Opened) -> str | None:
    if not getattr(opened.tokenizer, "is_fast", False):
        return lacks_language_model(opened) or "a fast tokenizer, to find the parts of a prompt again"
    return lacks_language_model(opened)


def prompt(opened: Opened, parts: Parts, own: Mapping[str, Any]) -> Prompt:
    """The prompt as token ids; `own` gets "places": for every named part the place of its last token."""
    text, spans = "", {}
    for words, name in parts:
        if name is not None:
            spans[name] = (len(text), len(text) + len(words))
        text += words
    encoded = opened.tokenizer(text, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    places = {
        name: max(n for n, (a, b) in enumerate(offsets) if a < stop and b > start and b > a)
        for name, (start, stop) in spans.items()
    }
    ids = torch.tensor([encoded["input_ids"]], device=opened.device)
    return Prompt({"input_ids": ids}, own={**own, "places": places})


def choices(opened: Opened, count: int, seed: int) -> list[Prompt]:
    """Multiple choice with four letters; every letter is right equally often. `own["right"]` is the letter's number."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        right = number % len(LETTERS)
        kinds = rng.permutation(list(KINDS))[: len(LETTERS)]
        words = [str(rng.choice(KINDS[kind])) for kind in kinds]
        parts: list[tuple[str, str | None]] = [(f"Which of these is {kinds[right]}?\n", None)]
        for letter, word in zip(LETTERS, words, strict=True):
            parts += [(letter, letter), (f". {word}\n", None)]
        found.append(prompt(opened, [*parts, ("Answer:", None)], {"right": right}))
    return found


def yes_or_no(opened: Opened, count: int, seed: int) -> list[Prompt]:
    """Whether a thing is of a kind; half are, and half of the prompts name "no" first."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        kind, other = rng.permutation(list(KINDS))[:2]
        word = rng.choice(KINDS[kind if number % 2 else other])
        order = ("yes", "no") if number // 2 % 2 else ("no", "yes")
        parts = [("Answer with ", None), (order[0], order[0]), (" or ", None), (order[1], order[1])]
        parts.append((f".\nQuestion: Is {word} {kind}?\nAnswer:", None))
        found.append(prompt(opened, parts, {"right": "yes" if number % 2 else "no"}))
    return found


def gifts(opened: Opened, count: int, seed: int) -> list[Prompt]:
    """ "When Mary and John went to the store, John gave a drink to": the next word is the name that came once. Half of
    the prompts name the giver first. Parts: "io", "s1", "s2", "end"."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        giver, receiver = (str(name) for name in rng.permutation(NAMES)[:2])
        first = [(receiver, "io"), (giver, "s1")]
        one, two = first if number % 2 else first[::-1]
        gift, place = rng.choice(GIFTS), rng.choice(PLACES)
        parts = [("When ", None), one, (" and ", None), two, (f" went to {place}, ", None), (giver, "s2")]
        parts += [(f" gave {gift} ", None), ("to", "end")]
        found.append(prompt(opened, parts, {"receiver": receiver, "giver": giver}))
    return found
