"""The trainer of the small models that studies make themselves, in seconds to minutes on a CPU.

    data = windows(ids, rows=16, length=64)
    trained = train(build(lambda: LlamaForCausalLM(config)), data, Recipe(steps=300, lr=2e-3), keep=(0, 100, 300))
    trained.losses                      # one a step
    for step, model in trained.each():  # the checkpoints, in order
        ...

A model is anything whose output has a `.loss` (every transformers model given `labels`). All chance comes from seeds:
the same model, data and recipe give the same weights on the same machine, and the caller's generators are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError

Draw = Callable[[torch.Generator], Mapping[str, Tensor]]
"""Draws one batch of model inputs (labels included) from a generator of random numbers."""


@dataclass(frozen=True)
class Recipe:
    """How to train. The learning rate rises over `warmup` steps, then stays or falls to 0 along a half cosine."""

    steps: int
    lr: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    warmup: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    clip: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.warmup < 0:
            raise HeadwiseError(
                f"Recipe wants at least one step, a positive lr and no negative warmup; got steps={self.steps}, "
                f"lr={self.lr}, warmup={self.warmup}."
            )
        if self.optimizer not in OPTIMIZERS or self.decay not in ("constant", "cosine"):
            raise HeadwiseError(
                f"Recipe: optimizer is one of {', '.join(OPTIMIZERS)}, decay constant or cosine; got "
                f"{self.optimizer!r}, {self.decay!r}."
            )

    def rate(self, step: int) -> float:
        """The learning rate of an update, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True, eq=False)
class Trained:
    """The trained model in eval mode, the loss of every step before its update, and the weights kept on the way."""

    model: nn.Module = field(repr=False)
    losses: Float[np.ndarray, " step"] = field(repr=False)
    kept: dict[int, dict[str, Tensor]] = field(repr=False)

    def at(self, step: int) -> nn.Module:
        """A copy of the model as it was after `step` updates."""
        if step not in self.kept:
            raise HeadwiseError(f"step: kept are the weights after {sorted(self.kept)} updates; got {step}.")
        model = deepcopy(self.model)
        model.load_state_dict(self.kept[step])
        return model

    def each(self) -> Iterator[tuple[int, nn.Module]]:
        """(step, model) of every checkpoint in order, one in memory at a time."""
        for step in sorted(self.kept):
            yield step, self.at(step)


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What `make` makes, with initial weights that `seed` alone decides."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def train(model: nn.Module, data: Draw, recipe: Recipe, keep: Sequence[int] = ()) -> Trained:
    """Trains, in place, the parameters of `model` that want gradients, and keeps the weights after `keep` updates (0 =
    before the first)."""
    wrong = [step for step in keep if not 0 <= step <= recipe.steps]
    if wrong:
        raise HeadwiseError(f"keep: the recipe makes 0 to {recipe.steps} updates; got {wrong}.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[recipe.optimizer](parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(recipe.seed)
    losses, kept = np.zeros(recipe.steps), {}
    model.train()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(recipe.seed)  # dropout
        for step in range(recipe.steps + 1):
            if step in keep:
                kept[step] = {name: value.detach().clone() for name, value in model.state_dict().items()}
            if step == recipe.steps:
                break
            loss = model(**data(generator)).loss
            losses[step] = loss.item()
            if not math.isfinite(losses[step]):
                raise HeadwiseError(f"train: the loss is {losses[step]} at step {step}; lower the lr of {recipe}.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.step()
    model.eval()
    return Trained(model, losses, kept)


@torch.no_grad()
def loss_of(model: nn.Module, data: Draw, batches: int, seed: int) -> float:
    """Mean loss over batches drawn with a seed of their own, the model left in its mode."""
    generator = torch.Generator().manual_seed(seed)
    return float(np.mean([model(**data(generator)).loss.item() for _ in range(batches)]))


def windows(ids: Int[Tensor, " token"], rows: int, length: int) -> Draw:
    """Random windows of a stream of tokens, for next-token prediction."""
    if len(ids) < length:
        raise HeadwiseError(f"length: the stream has {len(ids)} tokens, fewer than the {length} asked for.")

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        starts = torch.randint(len(ids) - length + 1, (rows, 1), generator=generator)
        batch = ids[starts + torch.arange(length)]
        return {"input_ids": batch, "labels": batch}

    return draw


def characters(text: str) -> tuple[Int[Tensor, " token"], str]:
    """A text as numbers of its characters, and the alphabet they count in."""
    alphabet = "".join(sorted(set(text)))
    number = {character: n for n, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text]), alphabet
