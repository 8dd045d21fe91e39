"""Which heads turn a word into its opposite, its past tense, its capital? Read from the weights alone (MAPS).

For a relation of pairs (s, t), each word one token: `phi = share of pairs with t among the k largest of
f(e_s) W_V W_O U` (`token_maps` says what f is), and the suppression score the same among the k smallest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.scan.grid import grid
from headwise.scan.norms import gain, norms_before
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.token_maps import after_first_mlp, embedded, lacks_token_map, unembedding, values
from headwise.scan.word_pairs import Pairs, relation, relations, single_tokens

LARGE_VOCABULARY = 100_000
"""From here on the paper asks for the top 25 instead of 10 (3 instead of 1 for copying), as it did for Llama 3."""
ROWS = 512
"""Rows of one matrix product: of a head's values, or of several heads' output matrices."""

PAPER = Paper("Inferring Functionality of Attention Heads from their Parameters", "2412.11965")


@dataclass(frozen=True, eq=False)
class RelationMap:
    """`scores` and `suppression` [layer, head], and the pairs that were one token a word."""

    scores: xr.DataArray
    suppression: xr.DataArray
    kept_pairs: list[tuple[str, str]]


def relation_scores(
    opened: Opened,
    pairs: Pairs | str,
    k: int | None = None,
    first_mlp: bool = True,
    leading_space: bool = True,
    min_pairs: int = 30,
    fold_norm: bool = False,
) -> RelationMap:
    """phi of every head of the text stream for one relation: pairs of words, or the name of one that headwise ships.

    `k=None`: 10, or 25 from a vocabulary of 100,000 on (1 and 3 for a named relation that copies). `fold_norm` (ours,
    not the paper's) multiplies by the gains of the norm before the head and of the last norm.

    Raises HeadwiseError for an unknown relation, and where fewer than `min_pairs` pairs are one token a word.
    """
    named = relation(pairs) if isinstance(pairs, str) else None
    words = named.pairs if named else pairs
    if reason := lacks_token_map(opened, first_mlp):
        raise HeadwiseError(f"relation_scores: {opened.name} lacks {reason}.")
    if k is not None and k < 1:
        raise HeadwiseError(f"k: wanted at least 1; got {k}.")
    both = [(pair, single_tokens(opened.tokenizer, [pair], leading_space)) for pair in words]
    kept = [(pair, ids[0]) for pair, ids in both if ids]
    if len(kept) < max(min_pairs, 1):
        raise HeadwiseError(
            f"min_pairs: wanted {min_pairs} pairs of one token a word; {opened.name}'s tokenizer writes {len(kept)} "
            f"of {len(words)} so."
        )
    source, target = torch.tensor([ids for _, ids in kept], device=opened.device).T
    k = k or default_k(opened, named is not None and named.copying)
    hits = static_hits(opened, source, target, torch.full_like(target, k), first_mlp, fold_norm)
    scores, suppression = (grid({layer: h[n].float().mean(-1) for layer, h in hits.items()}) for n in (0, 1))
    return RelationMap(scores, suppression, [tuple(pair) for pair, _ in kept])


def default_k(opened: Opened, copying: bool) -> int:
    large = unembedding(opened).shape[1] >= LARGE_VOCABULARY
    return (3 if large else 1) if copying else (25 if large else 10)


@torch.no_grad()
def static_hits(
    opened: Opened,
    source: Int[Tensor, " pair"],
    target: Int[Tensor, " pair"],
    k: Int[Tensor, " pair"],
    first_mlp: bool = True,
    fold_norm: bool = False,
) -> dict[int, tuple[Bool[Tensor, "head pair"], Bool[Tensor, "head pair"]]]:
    """Layer -> whether each target is among the k largest, and among the k smallest, of each head's logits."""
    unembed = unembedding(opened)
    raw, deep = embedded(opened, source), after_first_mlp(opened, source) if first_mlp else None
    gains: dict[int, Tensor] = {}
    if fold_norm:
        sample = {"input_ids": source[None, :1]}  # of one token: the last norm's output then reaches U uncut
        gains = {layer: gain(norm, len(unembed)) for layer, norm in norms_before(opened, sample, "text").items()}
        last = norms_before(opened, sample, "text", {-1: opened.model.get_output_embeddings()})
        unembed = unembed * gain(last[-1], len(unembed))[:, None] if last else unembed
    found = {}
    for site in text_sites(opened):
        read = raw if deep is None or site.layer == 0 else deep
        read = read * gains[site.layer] if site.layer in gains else read
        z = torch.stack([values(site, read, head) for head in range(site.heads)])
        found[site.layer] = among(site, z, target, k, unembed)
    return found


def among(
    site: Site,
    z: Float[Tensor, "head item channel"],
    target: Int[Tensor, " item"],
    k: Int[Tensor, " item"],
    unembed: Float[Tensor, "model vocabulary"],
) -> tuple[Bool[Tensor, "head item"], Bool[Tensor, "head item"]]:
    """Whether each target is among the k largest, and the k smallest, of `z W_O U`."""
    most = min(int(k.max()), unembed.shape[1])
    first = torch.arange(most, device=k.device) < k[:, None]
    hits = torch.zeros(2, *z.shape[:2], dtype=torch.bool, device=z.device)
    for heads in torch.arange(site.heads).split(
        max(1, ROWS // site.value_dim)
    ):  # several heads a product: twice as fast
        circuits = site.W_O[heads].detach().float().flatten(0, 1) @ unembed
        for head, circuit in zip(heads.tolist(), circuits.split(site.value_dim), strict=True):
            for rows in torch.arange(len(target)).split(ROWS):
                logits = z[head, rows] @ circuit
                for side, largest in enumerate((True, False)):
                    place = logits.topk(most, dim=-1, largest=largest).indices
                    hits[side, head, rows] = ((place == target[rows, None]) & first[rows]).any(-1)
    return hits[0], hits[1]


def text_sites(opened: Opened) -> Iterator[Site]:
    return (site for site in opened.sites if site.stream == "text" and site.kind == "self")


@dataclass(frozen=True)
class MapsRelations(Question):
    """`maps_relations`: the highest phi over all relations; `maps_<relation>`: phi of one. Relations of which the
    tokenizer writes fewer than `min_pairs` pairs with one token a word have no column; at most `max_pairs` are read.
    Profiles `maps_suppression` (layer, head, relation) and `maps_pairs` (relation: how many pairs were read)."""

    relations: tuple[str, ...] = (
        "copying", "name_copying", "first_letter", "antonym", "comparative", "past_tense", "pronoun", "capital", "next",
    )  # fmt: skip
    first_mlp: bool = True
    min_pairs: int = 30
    max_pairs: int = 30
    threshold: float = 0.15  # type: ignore[misc]
    paper: ClassVar[Paper] = PAPER
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in self.relations:
            relation(name)
        if not self.relations or not 1 <= self.min_pairs <= self.max_pairs:
            raise HeadwiseError(
                "MapsRelations wants at least one relation and 1 <= min_pairs <= max_pairs; got "
                f"{self.relations!r}, {self.min_pairs!r}, {self.max_pairs!r}."
            )

    def columns(self) -> tuple[Column, ...]:
        unit = "share of word pairs"
        best = Column(
            "maps_relations",
            "Relations, by weights",
            "From the weights alone: the named relation between words that the head's value-output circuit maps best.",
            unit,
            "turns words into related words",
            self.threshold,
        )
        return best, *(
            Column(
                f"maps_{name}",
                f"Writes {relations()[name].phrase}",
                f"From the weights alone: how often the head writes {relations()[name].phrase} of the word it reads.",
                unit,
                f"writes {relations()[name].phrase}",
                self.threshold,
            )
            for name in self.relations
        )

    def lacks(self, opened: Opened) -> str | None:
        return lacks_token_map(opened, self.first_mlp)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def pairs(self, opened: Opened) -> dict[str, list[tuple[int, int]]]:
        """The token pairs of every relation that has enough of them."""
        every = {name: single_tokens(opened.tokenizer, relation(name).pairs) for name in self.relations}
        kept = {name: pairs[: self.max_pairs] for name, pairs in every.items() if len(pairs) >= self.min_pairs}
        if not kept:
            raise HeadwiseError(
                f"MapsRelations: {opened.name}'s tokenizer writes fewer than min_pairs={self.min_pairs} pairs of every "
                "relation with one token a word."
            )
        return kept

    def prompts(self, opened: Opened) -> list[Prompt]:
        pairs = self.pairs(opened)
        ids = torch.tensor([[s for some in pairs.values() for s, _ in some]], device=opened.device)
        return [Prompt({"input_ids": ids}, own=pairs)]

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        pairs: dict[str, list[tuple[int, int]]] = prompt.own
        every = torch.tensor([pair for some in pairs.values() for pair in some], device=opened.device)
        k = torch.tensor([default_k(opened, relation(n).copying) for n, some in pairs.items() for _ in some])
        hits = static_hits(opened, every[:, 0], every[:, 1], k.to(opened.device), self.first_mlp)
        sizes = [len(some) for some in pairs.values()]
        data = {}
        for side, name in enumerate(("phi", "suppression")):
            parts = [
                grid({layer: h[side].split(sizes, -1)[n].float().mean(-1) for layer, h in hits.items()})
                for n in range(len(sizes))
            ]
            data[name] = xr.concat(parts, "relation").assign_coords(relation=list(pairs))
        data["pairs"] = xr.DataArray([float(n) for n in sizes], {"relation": list(pairs)}, ("relation",))
        return {"text": xr.Dataset(data)}

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        phi = values["phi"]
        each = {f"maps_{name}": phi.sel(relation=name, drop=True) for name in phi["relation"].values.tolist()}
        return {"maps_relations": phi.max("relation"), **each}

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {"maps_suppression": values["suppression"], "maps_pairs": values["pairs"]}
