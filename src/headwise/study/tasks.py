"""Tasks with known answers, made from a seed: what a steered model is tried on.

Every example is a multiple choice whose parts are known by their characters, so that they can be named as segments.
People and facts are made up; no model can know them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.steer import Choice, mark_last

FIRST = ("Alden", "Brisa", "Corin", "Dalia", "Edric", "Fenna", "Gareth", "Hilde", "Ivor", "Jorun", "Kester", "Liora")
LAST = ("Maddox", "Norwell", "Ostrander", "Pembury", "Quillan", "Radley", "Selwyn", "Thornby", "Umber", "Vance")
JOBS = (
    "baker",
    "lawyer",
    "painter",
    "farmer",
    "teacher",
    "doctor",
    "singer",
    "driver",
    "tailor",
    "pilot",
    "judge",
    "writer",
)
HOBBIES = (
    "collects old maps",
    "swims every morning",
    "grows tall roses",
    "plays the cello",
    "walks two dogs",
    "keeps bees",
)
NAMES = ("Mary", "John", "Tom", "Anna", "Peter", "Sarah", "James", "Alice", "Paul", "Laura", "David", "Emma")
PLACES = ("store", "park", "school", "station", "office", "garden")
GIFTS = ("book", "drink", "ring", "letter", "key", "cake")
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "orange")
OBJECTS = tuple("cup pen ball hat box bag plate lamp coat knife sheet mug scarf book ring jar key".split())
FURNITURE = ("table", "desk", "floor")
SEEN = ("there is", "you see", "I see")
GOOD = ("wonderful", "excellent", "brilliant", "charming", "superb", "delightful", "great", "lovely")
BAD = ("terrible", "awful", "boring", "dreadful", "poor", "horrible", "dull", "weak")
THINGS = ("film", "book", "meal", "song", "hotel", "game", "play", "story")
TOPICS = {
    " sport": ("goal", "match", "referee", "stadium", "racket", "marathon", "coach", "penalty"),
    " food": ("soup", "recipe", "oven", "sauce", "bakery", "onion", "dessert", "kitchen"),
    " music": ("violin", "choir", "melody", "drummer", "concert", "rhythm", "piano", "singer"),
    " money": ("loan", "bank", "salary", "tax", "invoice", "savings", "budget", "rent"),
}
SPOKEN = (
    "They talked about the {word} all evening.",
    "The {word} was better than we had hoped.",
    "She wrote a long letter about the {word}.",
    "Nobody had expected such a {word}.",
)
FRAMES = (
    "The {thing} was {word}.",
    "What a {word} {thing}.",
    "I found the {thing} {word}.",
    "It is a {word} {thing}, I think.",
)


@dataclass(frozen=True)
class Example(Choice):
    """`spans`: the named parts of the prompt, by characters. `place`: where among its items the gold one stands."""

    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    place: int | None = None

    def segments(self, opened: Opened) -> Segments:
        """The parts as segments, and the last token as "last"."""
        named = Segments.from_characters(self.prompt, self.spans, opened.tokenizer)
        return mark_last(opened.encode(self.prompt), named)


def documents(seed: int, count: int, items: int = 8, place: int | None = None) -> list[Example]:
    """One of `items` short biographies answers the question. The gold one stands at `place` (None: at every place as
    often). Segments "document 1", ..., "question"."""
    rng = np.random.default_rng(seed)
    _check(items, 2, len(JOBS))
    found = []
    for number in range(count):
        gold = number % items if place is None else place
        names = [f"{rng.choice(FIRST)} {last}" for last in rng.permutation(LAST)[:items]]
        if len(names) < items:
            raise HeadwiseError(f"items: there are names for {len(LAST)} documents; got {items}.")
        jobs = rng.permutation(JOBS)[:items].tolist()
        docs = [f"{name} is a {job} and {rng.choice(HOBBIES)}." for name, job in zip(names, jobs, strict=True)]
        text, spans = "Read about some people.\n\n", {}
        for n, document in enumerate(docs):
            spans[f"document {n + 1}"] = (len(text), len(text) + len(document))
            text += document + "\n\n"
        question = f"What is the job of {names[gold]}? {names[gold]} is a"
        spans["question"] = (len(text), len(text) + len(question))
        options = tuple(f" {job}" for job in jobs)
        found.append(Example(text + question, options, gold, spans, gold))
    return found


def key_values(seed: int, count: int, items: int = 12, place: int | None = None) -> list[Example]:
    """Find the value of a key in a list of random pairs. Segments "pair 1", ..., "question"."""
    rng = np.random.default_rng(seed)
    _check(items, 2, 60)
    found = []
    for number in range(count):
        gold = number % items if place is None else place
        keys = [
            f"{a}{b}"
            for a, b in zip(rng.choice(list("BCDFGHJKLM"), items), rng.permutation(90)[:items] + 10, strict=True)
        ]
        values = [str(v) for v in rng.permutation(900)[:items] + 100]
        text, spans = "", {}
        for n, (key, value) in enumerate(zip(keys, values, strict=True)):
            line = f"key {key}: value {value}\n"
            spans[f"pair {n + 1}"] = (len(text), len(text) + len(line) - 1)
            text += line
        question = f"key {keys[gold]}: value"
        spans["question"] = (len(text), len(text) + len(question))
        found.append(Example(text + question, tuple(f" {v}" for v in values), gold, spans, gold))
    return found


def sentiment(seed: int, count: int, shots: int = 0) -> list[Example]:
    """Is a sentence positive or negative, after `shots` examples. Segments "shots", "sentence"."""
    rng = np.random.default_rng(seed)

    def one() -> tuple[str, int]:
        gold = int(rng.integers(2))
        word = rng.choice((GOOD, BAD)[gold])
        return str(rng.choice(FRAMES)).format(thing=rng.choice(THINGS), word=word), gold

    labels = (" positive", " negative")
    found = []
    for _ in range(count):
        before = "".join(f"Review: {s}\nSentiment:{labels[g]}\n\n" for s, g in (one() for _ in range(shots)))
        sentence, gold = one()
        start = len(before) + len("Review: ")
        spans = {"sentence": (start, start + len(sentence))} | ({"shots": (0, len(before))} if before else {})
        found.append(Example(f"{before}Review: {sentence}\nSentiment:", labels, gold, spans))
    return found


def topic(seed: int, count: int, shots: int = 0) -> list[Example]:
    """Which of four topics is a sentence about, after `shots` examples. Segments "shots", "sentence"."""
    rng = np.random.default_rng(seed)
    labels = tuple(TOPICS)

    def one() -> tuple[str, int]:
        gold = int(rng.integers(len(labels)))
        return str(rng.choice(SPOKEN)).format(word=rng.choice(TOPICS[labels[gold]])), gold

    found = []
    for _ in range(count):
        before = "".join(f"Text: {s}\nTopic:{labels[g]}\n\n" for s, g in (one() for _ in range(shots)))
        sentence, gold = one()
        start = len(before) + len("Text: ")
        spans = {"sentence": (start, start + len(sentence))} | ({"shots": (0, len(before))} if before else {})
        found.append(Example(f"{before}Text: {sentence}\nTopic:", labels, gold, spans))
    return found


def ioi(seed: int, count: int) -> list[Example]:
    """Who is given the thing: "When A and B went to the store, B gave a drink to" A. Segments "giver", "receiver"."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        a, b = (str(n) for n in rng.permutation(NAMES)[:2])
        one, two = (a, b) if rng.integers(2) else (b, a)
        text = f"When {one} and {two} went to the {rng.choice(PLACES)}, {b} gave a {rng.choice(GIFTS)} to"
        spans = {"receiver": _span(text, a), "giver": _span(text, b)}
        found.append(Example(text, (f" {a}", f" {b}"), 0, spans))
    return found


def coloured_objects(seed: int, count: int) -> list[Example]:
    """The colour of one of three objects, after one worked example. Segments "colour 1" to "colour 3", "question"."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        text = ""
        for last in (False, True):
            colours = [str(c) for c in rng.permutation(COLOURS)[:3]]
            objects = [str(o) for o in rng.permutation(OBJECTS)[:3]]
            gold = int(rng.integers(3))
            spans = {}
            text += f"Q: On the {rng.choice(FURNITURE)}, {rng.choice(SEEN)}"
            for n, (colour, thing) in enumerate(zip(colours, objects, strict=True)):
                text += (" a ", ", a ", ", and a ")[n]
                spans[f"colour {n + 1}"] = (len(text), len(text) + len(colour))
                text += f"{colour} {thing}"
            question = f"What color is the {objects[gold]}?"
            text += ". "
            spans["question"] = (len(text), len(text) + len(question))
            text += f"{question}\nA:" + ("" if last else f" {colours[gold].capitalize()}\n")
        found.append(Example(text, tuple(f" {c.capitalize()}" for c in colours), gold, spans, gold))
    return found


def _span(text: str, word: str) -> tuple[int, int]:
    return text.index(word), text.index(word) + len(word)


def _check(items: int, least: int, most: int) -> None:
    if not least <= items <= most:
        raise HeadwiseError(f"items: wanted {least} to {most}; got {items}.")


TASKS: Sequence = (documents, key_values, sentiment, topic, ioi, coloured_objects)
