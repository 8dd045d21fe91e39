"""How much syntax do all attention maps hold together? Probes that find every word's head word (Clark et al., 2019).

The model stays as it is; a probe gives every word i a score as the head of word j, softmax over i != j:

- "attention": `sum_k w_k a^k_ij + u_k a^k_ji` over all heads k, two weights a head;
- "attention+words": the weights are linear in the two words, `w(i, j) = b + V v_i + U v_j`, u likewise;
- "words+distance", the baseline without attention: 256 tanh units on v_i, v_j and how far apart they are.

v are fixed vectors of words: the model's own input embeddings, mean over pieces (the paper's are GloVe). Only words
with a gold arc are trained on and counted, so that the paper's ROOT has no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.grammar import Sentence
from headwise.scan.needs import quiet
from headwise.scan.relations import BATCH, prompt
from headwise.scan.run import evaluating

MODES = ("attention", "attention+words", "words+distance")


@dataclass(frozen=True, eq=False)
class Maps:
    """Word-level maps of some sentences, padded to the longest."""

    weights: Float[Tensor, "sentence map word word"]
    vectors: Float[Tensor, "sentence word dim"]
    real: Bool[Tensor, "sentence word"]
    head: Int[Tensor, "sentence word"]
    """The gold head word; -1 where a word has none."""

    def __len__(self) -> int:
        return len(self.head)

    def __getitem__(self, chosen: Int[Tensor, " some"]) -> Maps:
        """Some of the sentences, padded to the longest of them."""
        n = int(self.real[chosen].sum(1).max())
        return Maps(
            self.weights[chosen][..., :n, :n],
            self.vectors[chosen][:, :n],
            self.real[chosen][:, :n],
            self.head[chosen][:, :n],
        )


def word_maps(opened: Opened, corpus: Sequence[Sentence]) -> Maps:
    """The maps of all heads (layer by layer) between the words of short sentences, in the order of `corpus`."""
    longest = max(len(s.words) for s in corpus)
    weights, vectors = [], []
    embed = opened.model.get_input_embeddings()
    for start in range(0, len(corpus), BATCH):
        batch = prompt(opened, corpus[start : start + BATCH])
        with evaluating(opened.model), attend(opened, readings=[Map(stream="text")]) as run:
            opened.model(**batch.inputs, **quiet(opened.model))
            vocabulary = embed(batch.inputs["input_ids"]).float().cpu()
        seen = run.tree["text"]["map"].transpose("sample", "layer", "head", "query", "key").values
        for one, vector, (_, units) in zip(torch.from_numpy(seen).flatten(1, 2), vocabulary, batch.own, strict=True):
            count, tokens = units.count, len(units.of)
            words = units.means(units.sums(one[:, :tokens, :tokens]))
            weights.append(F.pad(words, (0, longest - count, 0, longest - count)))
            vectors.append(F.pad(units.means(vector[:tokens]), (0, 0, 0, longest - count)))
    head = torch.full((len(corpus), longest), -1)
    real = torch.zeros(len(corpus), longest, dtype=torch.bool)
    for n, sentence in enumerate(corpus):
        real[n, : len(sentence.words)] = True
        for arc in sentence.arcs:
            head[n, arc.dependent] = arc.head
    return Maps(torch.stack(weights), torch.stack(vectors), real, head)


class AttentionProbe(nn.Module):
    """Scores [sentence, dependent, candidate] from the maps, and from the words where mode is "attention+words"."""

    def __init__(self, maps: int, dim: int, mode: str = "attention"):
        super().__init__()
        self.fixed = nn.Parameter(torch.zeros(2, maps))
        words = mode == "attention+words"
        self.by_head = nn.Parameter(torch.zeros(2, dim, maps)) if words else None
        self.by_dependent = nn.Parameter(torch.zeros(2, dim, maps)) if words else None

    def forward(self, data: Maps) -> Float[Tensor, "sentence word word"]:
        scores = 0.0
        for n, weights in enumerate((data.weights.mT, data.weights)):  # a_ij and a_ji, both as [dependent j, head i]
            scores = scores + torch.einsum("k,skji->sji", self.fixed[n], weights)
            if self.by_head is not None:
                scores = scores + torch.einsum("sik,skji->sji", data.vectors @ self.by_head[n], weights)
                scores = scores + torch.einsum("sjk,skji->sji", data.vectors @ self.by_dependent[n], weights)
        return scores


class DistanceProbe(nn.Module):
    """The same scores from the two words and their distance alone: no attention."""

    def __init__(self, dim: int, units: int = 256):
        super().__init__()
        self.head, self.dependent = nn.Linear(dim, units), nn.Linear(dim, units, bias=False)
        self.distance, self.out = nn.Linear(8, units, bias=False), nn.Linear(units, 1, bias=False)

    def forward(self, data: Maps) -> Float[Tensor, "sentence word word"]:
        place = torch.arange(data.vectors.shape[1])
        step = (place - place[:, None]).float()
        sides = torch.stack([step.clamp(min=0), (-step).clamp(min=0)], -1)
        features = torch.cat([sides == 1, sides == 2, sides.log1p(), sides > 0], -1).float()
        pair = self.head(data.vectors)[:, None] + self.dependent(data.vectors)[:, :, None] + self.distance(features)
        return self.out(torch.tanh(pair))[..., 0]


def train_probe(data: Maps, mode: str = "attention", steps: int = 300, seed: int = 0) -> nn.Module:
    """A probe trained by cross-entropy with Adam, in batches of 32 sentences."""
    if mode not in MODES:
        raise HeadwiseError(f"mode: wanted one of {', '.join(MODES)}; got {mode!r}.")
    if not bool((data.head >= 0).any()):
        raise HeadwiseError("data: none of the sentences has an arc.")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maps, dim = data.weights.shape[1], data.vectors.shape[-1]
        probe = DistanceProbe(dim) if mode == "words+distance" else AttentionProbe(maps, dim, mode)
    optimiser = torch.optim.Adam(probe.parameters(), lr=1e-2 if mode != "words+distance" else 1e-3)
    with torch.enable_grad():
        for _ in range(steps):
            batch = data[torch.randint(len(data), (min(32, len(data)),), generator=generator)]
            gold = batch.head >= 0
            loss = F.cross_entropy(candidates(probe, batch)[gold], batch.head[gold])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return probe.eval()


def candidates(probe: nn.Module, data: Maps) -> Float[Tensor, "sentence word word"]:
    """The probe's scores, without the word itself and without padding."""
    itself = torch.eye(data.real.shape[1], dtype=torch.bool)
    return probe(data).masked_fill(itself | ~data.real[:, None], float("-inf"))


@torch.no_grad()
def attachment(probe: nn.Module, data: Maps) -> float:
    """Unlabelled attachment score: the share of words with an arc whose head the probe finds."""
    gold = data.head >= 0
    return float((candidates(probe, data).argmax(-1) == data.head)[gold].float().mean())
