"""Documents of a topic model, masked for prediction, and the one-layer transformers that learn from them.

Topics have disjoint sets of words; a document draws its mix of topics from a Dirichlet, every word its topic from the
mix and itself evenly from the topic. The model is the reduced one of the theory, `U(W_V Z softmax(Z^T W_K^T W_Q Z /
sqrt(d))) + b`: one head, no positions, no residual stream, no norm, no feed-forward part.

Paper: How Do Transformers Learn Topic Structure: Towards a Mechanistic Understanding, arXiv 2303.04245.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100


@dataclass(frozen=True)
class TopicCorpus:
    """Draws batches for masked prediction, as `train` wants them. All documents of a batch have one length, so that
    there is no padding; start and end tokens, which no measure looks at, are left out.

    Of the positions a share `masked` is predicted; of these `kept` keep their word, `random` get another one, and the
    others the mask token, whose id is the number of words."""

    topics: int = 10
    words: int = 10
    alpha: float = 0.1
    length: tuple[int, int] = (100, 150)
    batch: int = 40
    masked: float = 0.15
    kept: float = 0.1
    random: float = 0.1

    @property
    def mask(self) -> int:
        return self.topics * self.words

    @property
    def labels(self) -> Int[Tensor, " token"]:
        """The topic of every token of the vocabulary, -1 for the mask."""
        return torch.cat([torch.arange(self.topics).repeat_interleave(self.words), torch.tensor([-1])])

    def documents(self, generator: torch.Generator) -> Int[Tensor, "document token"]:
        draw = np.random.default_rng(torch.randint(2**62, (1,), generator=generator).item())
        length = draw.integers(self.length[0], self.length[1] + 1)
        mixes = draw.dirichlet([self.alpha] * self.topics, self.batch)
        topics = np.stack([draw.choice(self.topics, length, p=mix) for mix in mixes])
        return torch.from_numpy(topics * self.words + draw.integers(self.words, size=topics.shape))

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        ids = self.documents(generator)
        fate = torch.rand(ids.shape, generator=generator) / self.masked
        other = torch.randint(self.mask, ids.shape, generator=generator)
        hidden = torch.where(fate < 1 - self.kept, other, ids)
        hidden = torch.where(fate < 1 - self.kept - self.random, self.mask, hidden)
        return {"input_ids": hidden, "labels": torch.where(fate < 1, ids, IGNORED)}


class TopicAttentionLayer(nn.Module):
    """One head without an output matrix; queries and keys of zero attend evenly."""

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = 1
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x)[:, None] for part in (self.q_proj, self.k_proj, self.v_proj))
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class TopicTransformer(nn.Module):
    """`embed`: "one_hot" (the decoder is then the identity) or "trained" (tied to the decoder). `trained` names the
    parts that learn, of "qk", "v" and "embedding"; the others stay: queries and keys at 0, values at the identity. What
    learns starts near 0, at `scale` times a standard normal. `loss` is cross-entropy or squared error."""

    def __init__(
        self,
        vocabulary: int,
        embed: Literal["one_hot", "trained"] = "one_hot",
        trained: tuple[str, ...] = ("qk", "v"),
        loss: Literal["cross_entropy", "squared"] = "cross_entropy",
        scale: float = 0.01,
    ):
        super().__init__()
        self.embedding = nn.Parameter(torch.eye(vocabulary), requires_grad=embed == "trained")
        self.attention = TopicAttentionLayer(vocabulary)
        self.bias = nn.Parameter(torch.zeros(vocabulary), requires_grad=loss == "cross_entropy")
        self.loss = loss
        layer = self.attention
        with torch.no_grad():
            for name, part in (("qk", layer.q_proj), ("qk", layer.k_proj), ("v", layer.v_proj)):
                fixed = torch.eye(vocabulary) if name == "v" else torch.zeros(vocabulary, vocabulary)
                part.weight.copy_(scale * torch.randn(vocabulary, vocabulary) if name in trained else fixed)
                part.weight.requires_grad_(name in trained)
            if embed == "trained":
                self.embedding.copy_(scale * torch.randn(vocabulary, vocabulary))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embedding[input_ids]
        logits = self.attention(x) @ self.embedding.T + self.bias
        if labels is None:
            return SimpleNamespace(logits=logits)
        chosen = labels != IGNORED
        if self.loss == "cross_entropy":
            return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits[chosen], labels[chosen]))
        wanted = F.one_hot(labels[chosen], logits.shape[-1]).to(logits.dtype)
        return SimpleNamespace(logits=logits, loss=(logits[chosen] - wanted).square().sum(-1).mean())


def optimal_value(corpus: TopicCorpus) -> Float[Tensor, "out in_"]:
    """An exact optimum of W_V for uniform attention, one-hot embeddings, squared error and endless documents: with
    `c = 1 - (1 - kept) masked`, a word gives `1 / (c v)` to every word of its topic, and the mask token
    `-random / (c (1 - kept - random) T v)` to every word.

    Only the sums over the words of a topic matter, so that this is one of many. Derived from the mean input: a word of
    a topic with share s makes up `c s / v + masked random / (T v)` of it, the mask `masked (1 - kept - random)`."""
    still = 1 - (1 - corpus.kept) * corpus.masked
    labels = corpus.labels
    same = (labels[:, None] == labels[None, :]) & (labels >= 0)[:, None]
    value = same.double() / (still * corpus.words)
    spread = still * (1 - corpus.kept - corpus.random) * corpus.mask
    value[: corpus.mask, corpus.mask] = -corpus.random / spread
    return value


def value_contrast(value: Float[Tensor, "out in_"], labels: Int[Tensor, " token"]) -> float:
    """Mean entry between words of one topic (the word itself included) less that between words of different topics."""
    words = labels >= 0
    same = labels[words][:, None] == labels[words][None, :]
    entries = value[words][:, words]
    return (entries[same].mean() - entries[~same].mean()).item()
