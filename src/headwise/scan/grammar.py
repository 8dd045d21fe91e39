"""English sentences of a small grammar, with their gold arcs: what relation heads and attention probes are asked about.

    S -> NP (adverb) verb NP (PP) .  |  NP was (adverb) participle by NP .
    NP -> (determiner | possessive pronoun | determiner noun 's) (adjective){0,2} noun (PP)
    PP -> preposition NP

Optional parts between the ends of an arc keep one fixed distance from being right for all of them. Arcs follow Stanford
dependencies: det, amod, poss, nsubj, dobj, pobj, auxpass; advmod and prep (a preposition's own head) always have the
same distance here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headwise.errors import HeadwiseError

DETERMINERS = "the a this every some that".split()
POSSESSIVES = "his her their our my".split()
ADJECTIVES = "old young small large red green quiet clever tired happy strange rich poor tall famous careful".split()
NOUNS = (
    "teacher doctor farmer child woman man soldier king artist student dog horse cat bird house garden letter book "
    "boat table window picture city river village"
).split()
OWNERS = "teacher doctor farmer woman man soldier king artist student neighbour".split()
VERBS = (
    "watched:watched followed:followed painted:painted found:found visited:visited sold:sold moved:moved saw:seen "
    "carried:carried admired:admired described:described wanted:wanted kept:kept took:taken remembered:remembered"
).split()
ADVERBS = "slowly often never quietly always suddenly finally rarely".split()
PREPOSITIONS = "near behind beside with without under from".split()


class Arc(NamedTuple):
    """`words[dependent]` stands in `relation` to `words[head]`."""

    relation: str
    dependent: int
    head: int


@dataclass(frozen=True)
class Sentence:
    words: tuple[str, ...]
    arcs: tuple[Arc, ...]

    def __post_init__(self) -> None:
        for arc in self.arcs:
            if not (0 <= arc.dependent < len(self.words) and 0 <= arc.head < len(self.words)):
                raise HeadwiseError(f"Sentence(arcs=...): {arc} does not fit in {len(self.words)} words.")

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each word is in the text."""
        starts = [sum(len(w) + 1 for w in self.words[:n]) for n in range(len(self.words))]
        return [(start, start + len(word)) for start, word in zip(starts, self.words, strict=True)]

    def source(self, arc: Arc) -> int:
        """The word whose attention stands for the dependent: of a possessor with 's, the 's (as the paper counts)."""
        after = arc.dependent + 1
        owned = arc.relation in ("poss", "nmod:poss") and after < len(self.words) and self.words[after] == "'s"
        return after if owned else arc.dependent


def sentences(count: int, seed: int = 0) -> list[Sentence]:
    """`count` different sentences, the same ones for the same seed."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        made = _Writer(draw).sentence()
        found.setdefault(made.text, made)
    return list(found.values())


@dataclass
class _Writer:
    draw: random.Random
    words: list[str] = field(default_factory=list)
    arcs: list[Arc] = field(default_factory=list)

    def sentence(self) -> Sentence:
        passive = self.draw.random() < 0.4
        active, participle = self.draw.choice(VERBS).split(":")
        subject = self.noun_phrase(0.4)
        auxiliary = self.add("was") if passive else None
        adverb = self.add(self.draw.choice(ADVERBS)) if self.draw.random() < 0.5 else None
        verb = self.add(participle if passive else active)
        self.arcs += [Arc("nsubj", subject, verb)]
        self.arcs += [Arc("auxpass", auxiliary, verb)] if auxiliary is not None else []
        self.arcs += [Arc("advmod", adverb, verb)] if adverb is not None else []
        if passive:
            self.prepositional(verb, "by", 0.3)
        else:
            self.arcs.append(Arc("dobj", self.noun_phrase(0.3), verb))
        self.add(".")
        for place, after in enumerate(self.words[1:]):
            if self.words[place] == "a" and after[0] in "aeiou":
                self.words[place] = "an"
        return Sentence(tuple(self.words), tuple(self.arcs))

    def add(self, word: str) -> int:
        self.words.append(word)
        return len(self.words) - 1

    def noun_phrase(self, further: float) -> int:
        """Returns where the noun is."""
        before = [("det", self.add(self.draw.choice(DETERMINERS)))]
        kind = self.draw.random()
        if kind < 0.2:
            self.words[-1] = self.draw.choice(POSSESSIVES)
            before = [("poss", before[0][1])]
        elif kind < 0.45:
            owner = self.add(self.draw.choice(OWNERS))
            self.arcs.append(Arc("det", before[0][1], owner))
            self.add("'s")
            before = [("poss", owner)]
        for adjective in self.draw.sample(ADJECTIVES, self.draw.choice((0, 0, 1, 1, 2))):
            before.append(("amod", self.add(adjective)))
        noun = self.add(self.draw.choice(NOUNS))
        self.arcs += [Arc(relation, place, noun) for relation, place in before]
        if self.draw.random() < further:
            self.prepositional(noun, self.draw.choice(PREPOSITIONS), 0.0)
        return noun

    def prepositional(self, head: int, preposition: str, further: float) -> None:
        place = self.add(preposition)
        self.arcs += [Arc("prep", place, head), Arc("pobj", self.noun_phrase(further), place)]


def read_conllu(text: str, skip: Sequence[str] = ("root", "punct")) -> list[Sentence]:
    """Sentences of a CoNLL-U file: columns id, form, ..., head (7th), relation (8th). Roots and punctuation have no
    arc; ranges (`3-4`) and empty words (`5.1`) are left out."""
    found = []
    for block in text.strip().split("\n\n"):
        rows = [line.split("\t") for line in block.splitlines() if line and not line.startswith("#")]
        short = next((row for row in rows if len(row) < 8), None)
        if short is not None:
            raise HeadwiseError(f"read_conllu: wanted at least 8 columns between tabs; got {short!r}.")
        rows = [row for row in rows if row[0].isdigit()]
        arcs = [Arc(r[7], int(r[0]) - 1, int(r[6]) - 1) for r in rows if r[7] not in skip and int(r[6]) > 0]
        found.append(Sentence(tuple(r[1] for r in rows), tuple(arcs)))
    return [s for s in found if s.words]
