"""Concepts that a language model has words for: prompts that ask for one of the words, and sentences that hold one."""

from __future__ import annotations

import random
from dataclasses import dataclass

from headwise.scan.word_pairs import relation

COLOURED = """grass green, snow white, blood red, coal black, bananas yellow, carrots orange, chocolate brown,
milk white, tomatoes red, lemons yellow, leaves green, wood brown, frogs green, crows black, roses red, clouds white,
ink black, flamingos pink, ash gray, plums purple"""
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()


@dataclass(frozen=True)
class Concept:
    """`cues` are put into `asking`, frames that end in the same word and go on with one of the concept; `words` into
    `telling`, other frames. (With ends that differ, what a head writes at the last token says which end it is.)"""

    words: tuple[str, ...]
    cues: tuple[str, ...]
    asking: tuple[str, ...]
    telling: tuple[str, ...]

    def halves(self, seed: int) -> tuple[list[str], list[str]]:
        """The prompts in two parts that share no cue."""
        cues = list(self.cues)
        random.Random(seed).shuffle(cues)
        middle = len(cues) // 2
        first, second = ([f.format(c) for c in part for f in self.asking] for part in (cues[:middle], cues[middle:]))
        return first, second

    def sentences(self, seed: int, count: int) -> list[tuple[str, tuple[int, int]]]:
        """Sentences and where, by characters, the word stands in them."""
        draw = random.Random(seed)
        every = [(frame, word) for frame in self.telling for word in self.words]
        found = []
        for frame, word in draw.sample(every, min(count, len(every))):
            start = frame.index("{}")
            found.append((frame.format(word), (start, start + len(word))))
        return found


def concepts() -> dict[str, Concept]:
    coloured = [tuple(pair.split()) for pair in COLOURED.split(",")]
    capitals = relation("capital").pairs
    return {
        "colours": Concept(
            tuple(sorted({colour for _, colour in coloured})),
            tuple(thing for thing, _ in coloured),
            ("The color of {} is", "Everybody knows that the color of {} is"),
            ("She wore a {} dress to the party.", "They painted the door {} last week.", "A {} car stopped outside."),
        ),
        "countries": Concept(
            tuple(country for country, _ in capitals),
            tuple(city for _, city in capitals[:24]),
            ("The city of {} is in", "We know that the old town of {} is in"),
            (
                "He moved to {} years ago.",
                "The ship came from {} with goods.",
                "Many people in {} speak two languages.",
            ),
        ),
        "months": Concept(
            tuple(MONTHS),
            tuple(MONTHS),
            ("The month after {} is", "The month before {} is"),
            ("The festival takes place in {} every year.", "He started the job in {}.", "By {} the lake was frozen."),
        ),
        "numbers": Concept(
            tuple(NUMBERS),
            tuple(NUMBERS),
            ("After the number {} comes the number", "Before the number {} comes the number"),
            ("There were {} chairs around the table.", "We waited {} days for it.", "She bought {} apples."),
        ),
    }
