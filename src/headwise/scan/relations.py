"""Which heads look from a word to the word it depends on? (Clark et al., 2019)

For words i (dependent) and every head, over the weights between words (`units.py` says how pieces become words):

- direction "from": the word predicted for i is the one it attends to most, `argmax over j != i of a_ij`;
- direction "to": the one that attends to i most, `argmax over j != i of a_ji`.

Special tokens are left out, and so is the word itself. The accuracy of a head for a relation is the share of its arcs
whose head word is predicted; that of a fixed offset, the share where the head word is so many words away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from headwise.attention.readings import Map, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.grammar import Sentence, sentences
from headwise.scan.maps import BLOCK
from headwise.scan.needs import accepts
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.units import Units, word_units

RELATIONS = ("det", "amod", "poss", "nsubj", "dobj", "pobj", "auxpass")
DIRECTIONS = ("from", "to")
OFFSETS = tuple(n for n in range(-5, 6) if n)
BATCH = 16


@dataclass(frozen=True)
class RelationHeads(Question):
    """Accuracy of every head for each of `relations`, in its better direction, on `sentences` of a small English
    grammar (or a `corpus` of your own, see `read_conllu`). `relation_heads` is the largest lead over a fixed offset.

    The best of many heads on few sentences is optimistic: `scan.relation_heads` chooses on some and scores on others.
    """

    sentences: int = 64
    first_seed: int = 0
    relations: tuple[str, ...] = RELATIONS
    corpus: tuple[Sentence, ...] | None = None
    paper: ClassVar[Paper] = Paper("What Does BERT Look At? An Analysis of BERT's Attention", "1906.04341")

    def __post_init__(self) -> None:
        if self.sentences < 1:
            raise HeadwiseError(f"RelationHeads(sentences=...) must be at least 1; got {self.sentences!r}.")
        missing = set(self.relations) - {arc.relation for s in self.asked for arc in s.arcs}
        if missing or not self.relations:
            raise HeadwiseError(
                f"RelationHeads(relations=...): no sentence has an arc {sorted(missing) or 'asked for'}."
            )

    @property
    def asked(self) -> tuple[Sentence, ...]:
        return self.corpus or _generated(self.sentences, self.first_seed)

    def columns(self) -> tuple[Column, ...]:
        lead = Column(
            "relation_heads",
            "Relation heads",
            "Share of the arcs of one grammatical relation the head finds, above that of the best fixed offset; the "
            "relation where this is largest.",
            "share of arcs",
            "finds a grammatical relation",
            0.1,
        )
        return lead, *(
            Column(
                f"relation_{r}", r, f"Share of {r} arcs the head finds, in its better direction.", "share of arcs", r
            )
            for r in self.relations
        )

    def lacks(self, opened: Opened) -> str | None:
        crossed = getattr(getattr(opened.model, "config", None), "is_encoder_decoder", False)
        fast = getattr(opened.tokenizer, "is_fast", False)
        if fast and "text" in opened.streams and accepts(opened.model, "input_ids") and not crossed:
            return None
        return "a model of text with a fast tokenizer"

    def streams(self, opened: Opened) -> Sequence[str]:
        return ("text",)

    def prompts(self, opened: Opened) -> list[Prompt]:
        # Sentences of about the same length stand in one batch.
        ordered = sorted(self.asked, key=lambda s: len(s.words))
        return [prompt(opened, ordered[n : n + BATCH]) for n in range(0, len(ordered), BATCH)]

    def readings(self, opened: Opened) -> list[Reading]:
        return [Map(stream="text")]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        maps = torch.from_numpy(values["map"].transpose("sample", "layer", "head", "query", "key").values)
        size = (len(self.relations), len(DIRECTIONS), *maps.shape[1:3])
        hits, count = np.zeros(size), np.zeros(size)
        for weights, (sentence, units) in zip(maps, prompt.own, strict=True):
            found = predictions(weights[..., : len(units.of), : len(units.of)], units)
            for arc in sentence.arcs:
                if arc.relation in self.relations:
                    place = self.relations.index(arc.relation)
                    hits[place] += found[..., sentence.source(arc)] == arc.head
                    count[place] += 1
        dims = ("relation", "direction", "layer", "head")
        coords = {"relation": list(self.relations), "direction": list(DIRECTIONS)}
        with np.errstate(invalid="ignore"):
            share = hits / count
        return xr.Dataset({"hits": (dims, share), "hits_count": (dims, count)}, coords)

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        best = values["hits"].max("direction")
        fixed = offset_accuracy(self.asked, self.relations).max("offset")
        columns = {"relation_heads": (best - fixed).max("relation")}
        return columns | {f"relation_{r}": best.sel(relation=r, drop=True) for r in self.relations}

    def profiles(self, values: xr.Dataset) -> Mapping[str, xr.DataArray]:
        return {"relation_accuracy": values["hits"]}


@cache
def _generated(count: int, seed: int) -> tuple[Sentence, ...]:
    return tuple(sentences(count, seed))


def prompt(opened: Opened, batch: Sequence[Sentence]) -> Prompt:
    """A batch of sentences, padded on the right. A sentence is at most one block of queries long."""
    units = [word_units(opened, s.text, s.spans) for s in batch]
    longest = max(len(u.of) for u in units)
    if longest > BLOCK:
        raise HeadwiseError(f"corpus: a sentence may have {BLOCK} tokens, as its whole map is read; got {longest}.")
    padding = opened.tokenizer.pad_token_id or 0  # whatever stands there is masked
    rows = [opened.tokenizer(s.text)["input_ids"] for s in batch]
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return Prompt(opened.encode({"input_ids": ids, "attention_mask": seen}), own=list(zip(batch, units, strict=True)))


def predictions(weights: Float[Tensor, "*head token token"], units: Units) -> np.ndarray:
    """The word every word is taken to depend on, [direction, *head, word]; -1 where all weights are 0."""
    words = units.means(units.sums(weights))
    words = words.masked_fill(torch.eye(units.count, dtype=torch.bool), 0.0)
    best = [w.max(-1) for w in (words, words.mT)]
    return torch.stack([torch.where(b.values > 0, b.indices, -1) for b in best]).numpy()


def offset_accuracy(
    asked: Iterable[Sentence], relations: Sequence[str] = RELATIONS, offsets: Sequence[int] = OFFSETS
) -> xr.DataArray:
    """Share of the arcs of each relation whose head word is `offset` words after the dependent: dims relation,
    offset."""
    steps = {r: [] for r in relations}
    for sentence in asked:
        for arc in sentence.arcs:
            if arc.relation in steps:
                steps[arc.relation].append(arc.head - sentence.source(arc))
    shares = [[np.mean(np.equal(steps[r], o)) if steps[r] else np.nan for o in offsets] for r in relations]
    return xr.DataArray(shares, {"relation": list(relations), "offset": list(offsets)}, name="accuracy")
