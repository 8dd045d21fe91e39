"""The tasks of the swap bench: small, made from a seed, with a held-out set that is the same for every mechanism.

    task = TASKS["recall"]()
    model = task.host(lambda layer: swap.Attention(64, 4, causal=task.causal), dim=64, layers=2, hidden=256)
    batch = task.draw(torch.Generator().manual_seed(0))     # model inputs, labels included
    quality(model, task)                                    # on the held-out set; `task.chance` of a blind answer

Tasks of a decoder give every mechanism the same learned positions; a mechanism may have its own beside them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headwise.extras import need
from headwise.study.hosts import Decoder, Make, Vectors
from headwise.study.train import characters

Batch = dict[str, Tensor]
HELD_OUT_SEED = 12_345
UNASKED = -100
"""The label of a token that nothing is asked of."""


class BenchTask(ABC):
    """Base of the tasks. `causal`: it wants a decoder; else an encoder."""

    name: ClassVar[str]
    what: ClassVar[str]
    """One line for lists."""
    causal: ClassVar[bool] = True
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    rows: ClassVar[int] = 32
    """Sequences a batch."""
    chance: float
    """The quality of an answer that doesn't look at the input."""

    @abstractmethod
    def host(self, make: Make, dim: int, layers: int, hidden: int) -> nn.Module:
        """A small model for the task around what `make` makes, `hidden` wide in its feed-forward part."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Batch:
        """One batch to train on."""

    def held_out(self) -> Iterator[Batch]:
        """What quality is measured on: by default 8 batches of a seed of their own."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        for _ in range(8):
            yield self.draw(generator)


class DecoderTask(BenchTask):
    """Next tokens out of a vocabulary, in sequences of one length."""

    vocabulary: int
    length: int

    def host(self, make: Make, dim: int, layers: int, hidden: int) -> nn.Module:
        return Decoder(make, self.vocabulary, dim, layers, hidden, positions=self.length)


class LanguageModel(DecoderTask):
    """Windows of 64 characters out of the help texts of Python itself (`pydoc_data.topics`, some 500 kB of English,
    a little different in each version); the last tenth of the text is held out. Chance: the entropy of the characters'
    frequencies in the training part."""

    name, what = "lm", "next character of English text"
    metric, higher_is_better = "bits per character", False

    def __init__(self) -> None:
        self.length = 64
        ids, alphabet = help_texts()
        self.vocabulary, cut = len(alphabet), len(ids) * 9 // 10
        self.training, self.kept = ids[:cut], ids[cut:]
        share = torch.bincount(self.training, minlength=self.vocabulary).double() / cut
        self.chance = float(torch.special.entr(share).sum() / math.log(2))

    def draw(self, generator: torch.Generator) -> Batch:
        return self.windows(self.training, generator)

    def held_out(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        for _ in range(8):
            yield self.windows(self.kept, generator)

    def windows(self, ids: Int[Tensor, " token"], generator: torch.Generator) -> Batch:
        starts = torch.randint(len(ids) - self.length + 1, (self.rows, 1), generator=generator)
        batch = ids[starts + torch.arange(self.length)]
        return {"input_ids": batch, "labels": batch}


@cache
def help_texts() -> tuple[Int[Tensor, " token"], str]:
    from pydoc_data.topics import topics  # a large module of the standard library

    return characters("".join(topics.values()))


class Copy(DecoderTask):
    """24 random letters out of 16, a separator, and the same letters again: asked are those after the separator."""

    name, what = "copy", "a random string once more"

    def __init__(self) -> None:
        self.letters, self.half = 16, 24
        self.vocabulary, self.length = self.letters + 1, 2 * self.half + 1
        self.chance = 1 / self.letters

    def draw(self, generator: torch.Generator) -> Batch:
        string = torch.randint(self.letters, (self.rows, self.half), generator=generator)
        separator = torch.full((self.rows, 1), self.letters)
        ids = torch.cat([string, separator, string], 1)
        return {"input_ids": ids, "labels": unasked_before(ids, self.half + 1)}


class Recall(DecoderTask):
    """Associative recall: 4 keys out of 8, each with a random value after it, four times over in a new order each time:
    asked are the values from the second time on (after "Zoology: Measuring and Improving Recall in Efficient Language
    Models", arXiv 2312.04927)."""

    name, what = "recall", "the values of 4 keys, seen before"

    def __init__(self) -> None:
        self.keys, self.values, self.pairs, self.times = 8, 8, 4, 4
        self.vocabulary, self.length = self.keys + self.values, 2 * self.pairs * self.times
        self.chance = 1 / self.values

    def draw(self, generator: torch.Generator) -> Batch:
        key = torch.rand(self.rows, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        value = self.keys + torch.randint(self.values, key.shape, generator=generator)
        pairs = torch.stack([key, value], -1)
        order = torch.rand(self.times, *key.shape, generator=generator).argsort(-1)
        ids = torch.cat([pairs.gather(1, o[..., None].expand_as(pairs)) for o in order], 1).flatten(1)
        labels = unasked_before(ids, 2 * self.pairs)
        labels[:, ::2] = UNASKED
        return {"input_ids": ids, "labels": labels}


class Retrieve(DecoderTask):
    """One fact in noise: 60 random tokens with a marker and a value somewhere between them, then the marker again:
    asked is the value."""

    name, what = "retrieve", "a value said once in 60 tokens of noise"

    def __init__(self) -> None:
        self.values, self.noise = 16, 16
        self.vocabulary, self.length = self.values + self.noise + 1, 64
        self.chance = 1 / self.values

    def draw(self, generator: torch.Generator) -> Batch:
        marker = self.values + self.noise
        ids = self.values + torch.randint(self.noise, (self.rows, self.length), generator=generator)
        value = torch.randint(self.values, (self.rows,), generator=generator)
        place = torch.randint(self.length - 3, (self.rows,), generator=generator)
        row = torch.arange(self.rows)
        ids[row, place], ids[row, place + 1] = marker, value
        ids[:, -2], ids[:, -1] = marker, value
        return {"input_ids": ids, "labels": unasked_before(ids, self.length - 1)}


class Images(BenchTask):
    """Handwritten digits of 8 x 8 pixels (scikit-learn's `load_digits`, 1,797 of them) as 16 patches of 2 x 2; every
    fifth image is held out. Chance: always the most frequent digit."""

    name, what, causal = "images", "which digit an image shows", False

    def __init__(self) -> None:
        found = need("sklearn.datasets", "analysis").load_digits()
        patches = torch.tensor(found.images, dtype=torch.float32) / 16
        patches = patches.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        kept = torch.arange(len(patches)) % 5 == 0
        labels = torch.tensor(found.target)
        self.training, self.kept = (patches[~kept], labels[~kept]), (patches[kept], labels[kept])
        self.chance = float(torch.bincount(labels[kept]).max() / kept.sum())

    def host(self, make: Make, dim: int, layers: int, hidden: int) -> nn.Module:
        return Vectors(make, 4, dim, layers, 10, 16, hidden)

    def draw(self, generator: torch.Generator) -> Batch:
        x, labels = self.training
        chosen = torch.randint(len(x), (self.rows,), generator=generator)
        return {"x": x[chosen], "labels": labels[chosen]}

    def held_out(self) -> Iterator[Batch]:
        for x, labels in zip(*(part.split(self.rows) for part in self.kept), strict=True):
            yield {"x": x, "labels": labels}


class Relations(BenchTask):
    """8 objects (vectors of 16 numbers) out of 1,024: asked of each is whether there is another like it; half of them
    have one. The held-out sets are made of other objects than those trained on, so that only the relation helps."""

    name, what, causal = "relations", "whether an object has a twin, for objects never seen", False

    def __init__(self) -> None:
        self.objects, self.width, self.length = 1024, 16, 8
        self.chance = 0.5
        drawn = torch.randn(2, self.objects, self.width, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
        self.training, self.kept = drawn

    def host(self, make: Make, dim: int, layers: int, hidden: int) -> nn.Module:
        host = Vectors(make, self.width, dim, layers, 2, self.length, hidden, pooled=False)
        nn.init.normal_(host.place.weight, std=0.02)  # the order means nothing here
        return host

    def draw(self, generator: torch.Generator) -> Batch:
        return self.sets(self.training, generator)

    def held_out(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        for _ in range(8):
            yield self.sets(self.kept, generator)

    def sets(self, objects: Tensor, generator: torch.Generator) -> Batch:
        twins, half = self.length // 4, self.length // 2
        chosen = torch.rand(self.rows, self.objects, generator=generator).topk(half + twins).indices
        chosen = torch.cat([chosen[:, :twins], chosen], 1)  # the first `twins` objects twice
        order = torch.rand(chosen.shape, generator=generator).argsort(1)
        labels = (torch.arange(self.length) < half).long().expand_as(chosen)
        labels = torch.cat([labels[:, :twins], labels[:, :twins], labels[:, half:]], 1)
        return {"x": objects[chosen.gather(1, order)], "labels": labels.gather(1, order)}


TASKS: dict[str, type[BenchTask]] = {
    task.name: task for task in (LanguageModel, Copy, Recall, Retrieve, Images, Relations)
}


def unasked_before(ids: Int[Tensor, "row token"], first: int) -> Int[Tensor, "row token"]:
    """The tokens as labels, those before `first` not asked for."""
    labels = ids.clone()
    labels[:, :first] = UNASKED
    return labels


@torch.no_grad()
def quality(model: nn.Module, task: BenchTask) -> float:
    """Of a model on the held-out set: the share of right answers, or bits per character."""
    device = next(model.parameters()).device
    total = asked = 0.0
    for batch in task.held_out():
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits, labels = model(**batch).logits, batch["labels"]
        if task.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        wanted = labels != UNASKED
        logits, labels = logits[wanted], labels[wanted]
        if task.metric == "accuracy":
            total += (logits.argmax(-1) == labels).sum().item()
        else:
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item() / math.log(2)
        asked += labels.numel()
    return total / asked
