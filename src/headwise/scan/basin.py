"""Does a model look at the first and the last of several documents more than at those in between?

K documents stand in a prompt, each between recognisable borders, then a question. The mass the question's tokens give
to the document in slot k, `a_k = mean_i sum_{j in document k} a_ij`, by default divided by the document's tokens, and
averaged over prompts that shuffle the documents: `P_k` measures the slot and not what stands in it. The edge ratio is
`mean(P_1, P_K) / mean(P_2 .. P_{K-1})`; above 1.3, with both edges above the mean inside, the profile is a basin.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import xarray as xr

from headwise.attention.readings import Mass, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.paper import Paper
from headwise.scan.needs import lacks_language_model
from headwise.scan.question import Column, Prompt, Question

NAMES = "Alda Brion Cassel Dorvin Elmira Farrow Gessa Holt Irven Jorla Kestan Lumen Morwen Nadar Orsk Pelga".split()
THINGS = "violin lantern kettle hammer ladder mirror basket compass blanket whistle candle barrel saddle drum".split()
PLACES = "attic cellar garden kitchen stable tower harbour library chapel workshop orchard barn mill bakery".split()
EDGE = 1.3


@dataclass(frozen=True)
class Shelf:
    """The documents of one prompt, in the order they stand in it, and the slot of the one that is asked for."""

    documents: tuple[str, ...]
    request: str
    gold: int | None = None
    answer: str = ""


@dataclass(frozen=True)
class AttentionBasin(Question):
    """`attention_basin`: the edge ratio of each head. Profiles: `basin_profile` [layer, slot], the mean over heads,
    `basin_heads` [layer, head, slot] and `basin_edge_ratio` [layer].

    Without `documents` a prompt holds `slots` invented facts, one of them asked for; with them, your own, asked for by
    `request`. `separated=False` runs them together without borders. `normalise`: "length" divides a document's mass by
    its tokens. The beginning of the prompt, where sinks are, belongs to no document."""

    slots: int = 6
    shuffles: int = 16
    documents: tuple[str, ...] | None = None
    request: str = ""
    separated: bool = True
    normalise: Literal["length", "none"] = "length"
    first_seed: int = 0
    threshold: float = EDGE  # type: ignore[misc]
    paper: ClassVar[Paper] = Paper(
        "Attention Basin: Why Contextual Position Matters in Large Language Models", "2508.05128"
    )

    def __post_init__(self) -> None:
        if self.normalise not in ("length", "none"):
            raise HeadwiseError(f'AttentionBasin(normalise=...) must be "length" or "none"; got {self.normalise!r}.')
        if bool(self.documents) != bool(self.request):
            raise HeadwiseError("AttentionBasin wants documents= and request= together, or neither.")
        if not 3 <= self.count <= min(len(NAMES), len(THINGS), 32) and self.documents is None:
            raise HeadwiseError(f"AttentionBasin(slots=...) must be 3 to {len(THINGS)}; got {self.slots!r}.")
        if not 3 <= self.count <= 32 or self.shuffles < 1:
            raise HeadwiseError(
                f"AttentionBasin wants 3 to 32 documents and a shuffle; got {self.count} and {self.shuffles}."
            )

    @property
    def count(self) -> int:
        return self.slots if self.documents is None else len(self.documents)

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                self.name,
                "Attention basin",
                "Attention from a question to the first and last of several documents, against those in between.",
                "ratio",
                "looks at the edges of a list",
                self.threshold,
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        if not getattr(opened.tokenizer, "is_fast", False):
            return lacks_language_model(opened) or "a fast tokenizer, to find the documents' tokens"
        return lacks_language_model(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        return [self.prompt(opened, self.shelf(self.first_seed + n)) for n in range(self.shuffles)]

    def shelf(self, seed: int) -> Shelf:
        """The documents of one prompt, shuffled."""
        draw = random.Random(seed)
        if self.documents is not None:
            return Shelf(tuple(draw.sample(self.documents, self.count)), self.request)
        facts = list(zip(*(draw.sample(words, self.count) for words in (NAMES, THINGS, PLACES)), strict=True))
        gold = seed % self.count  # every slot is asked for as often as the others
        name, thing, place = facts[gold]
        return Shelf(
            tuple(f"{name} keeps a {thing} in the {place}." for name, thing, place in facts),
            f"What does {name} keep in the {place}?",
            gold,
            f"{name} keeps a {thing}",
        )

    def prompt(self, opened: Opened, shelf: Shelf, answer: str = "") -> Prompt:
        """The documents and the request in the chat template (where there is one), then the given part of an answer."""
        bodies = [
            f"Document {n}: {text}\n\n" if self.separated else f"{text} " for n, text in enumerate(shelf.documents, 1)
        ]
        content = (
            f"Read the documents and answer.\n\n{''.join(bodies)}{'' if self.separated else chr(10)}{shelf.request}"
        )
        text = f"{content}\n"
        if getattr(opened.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": content}]
            text = opened.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        spans: dict[str, tuple[int, int]] = {}
        place = text.index("Read the documents")
        for number, body in enumerate(bodies, 1):
            start = text.index(body.strip(), place)
            place = start + len(body.strip())
            spans[f"document {number}"] = (start, place)
        start = text.index(shelf.request, place)
        spans["request"] = (start, start + len(shelf.request))
        encoding = opened.tokenizer(text + answer, return_offsets_mapping=True, add_special_tokens=False)
        segments = Segments.from_characters(text + answer, spans, encoding)
        return Prompt(opened.encode(torch.tensor([encoding["input_ids"]])), {"text": segments}, own=shelf)

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        asking = text_segments(prompt).mask("request").nonzero().flatten().tolist()
        return [Mass(self.names, per="head", queries=asking, stream="text")]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"document {n}" for n in range(1, self.count + 1))

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        segments = text_segments(prompt)
        mass = values["mass"].sel(segment=list(self.names))
        if self.normalise == "length":
            mass = mass / xr.DataArray([int(segments.mask(n).sum()) for n in self.names], dims="segment")
        slots = mass.rename(segment="slot").assign_coords(slot=range(1, self.count + 1))
        return xr.Dataset({"slots": slots, "layers": slots.mean("head")})

    def score(self, values: xr.Dataset) -> xr.DataArray:
        return edge_ratio(values["slots"])

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        layers = values["layers"].transpose("layer", "slot")
        return {
            "basin_profile": layers,
            "basin_profile_sem": values["layers_sem"].transpose("layer", "slot"),
            "basin_heads": values["slots"].transpose("layer", "head", "slot"),
            "basin_edge_ratio": edge_ratio(layers),
        }


def edge_ratio(profile: xr.DataArray) -> xr.DataArray:
    """Mean of the first and last slot over the mean of those in between."""
    return profile.isel(slot=[0, -1]).mean("slot") / profile.isel(slot=slice(1, -1)).mean("slot")


def basin_layer(profile: xr.DataArray, threshold: float = EDGE) -> int | None:
    """The shallowest layer of a profile [layer, slot] with an edge ratio of at least the threshold and both edges above
    the mean inside; None where no layer has a basin."""
    inside = profile.isel(slot=slice(1, -1)).mean("slot")
    both = (profile.isel(slot=0) > inside) & (profile.isel(slot=-1) > inside)
    found = profile["layer"].values[((edge_ratio(profile) >= threshold) & both).values]
    return int(found[0]) if len(found) else None


def text_segments(prompt: Prompt) -> Segments:
    assert prompt.segments is not None  # `AttentionBasin.prompt` makes them
    return prompt.segments["text"]
