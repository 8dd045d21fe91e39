"""Does a decoder gain when its last layer reads the outputs of all layers, and what does it read them for?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise import swap
from headwise.study.bench_tasks import LanguageModel, quality
from headwise.study.finding import Finding
from headwise.study.hosts import Block, Decoder, HostOutput, matched
from headwise.study.registry import study
from headwise.study.swap_train import by_seed, count, fitted, host
from headwise.study.train import build

DIM, HEADS = 64, 4


class ShortcutGPT(Decoder):
    """A decoder whose last layer has a LayerShortcutAttention over the outputs of all others for its self-attention."""

    def __init__(self, vocabulary: int, dim: int, layers: int, hidden: int, positions: int, **own: Any):
        def make(layer: int) -> nn.Module:
            if layer == layers - 1:
                return swap.LayerShortcutAttention(dim, HEADS, depths=range(layers - 1), **own)
            return swap.Attention(dim, HEADS, causal=True, position=swap.Rope())

        super().__init__(make, vocabulary, dim, layers, hidden, positions)
        *front, last = self.blocks
        self.front, self.last, self.blocks = nn.ModuleList(front), last, nn.ModuleList()
        self.last.norm = nn.Identity()  # the shortcut has norms of its own

    def states(self, x: Tensor) -> Tensor:
        """Outputs of all layers but the last: [batch, token, state, dim]."""
        found = []
        for block in self.front:
            x = block(x)
            found.append(x)
        return torch.stack(found, 2)

    def read(self, x: Tensor, *given: Any, **more: Any) -> HostOutput:
        assert isinstance(self.last, Block)
        states = self.states(x)
        x = states[:, :, -1] + self.last.mechanism(states)
        x = x + self.last.mlp(self.last.norm_mlp(x))
        return super().read(x, *given, **more)

    @torch.no_grad()
    def mean_depth(self, ids: Tensor) -> Tensor:
        """From 0, the first layer, to 1: the mean depth that each token's heads read, [batch, token]."""
        x = self.embed(ids)
        if self.place is not None:
            x = x + self.place.weight[: ids.shape[1]]
        states = self.states(x)
        usage = self.last.mechanism.depth_usage(states).mean(1)  # type: ignore[operator, union-attr]
        return usage @ torch.linspace(0, 1, usage.shape[-1])


@study(
    "layer_shortcuts",
    paper=swap.LayerShortcutAttention.paper,
    room="swap",
    claim="A last layer that attends over the outputs of all layers lowers the loss, and reads deeper for hard tokens.",
)
def layer_shortcuts(seeds: Sequence[int] = (0, 1, 2), steps: int = 250, rows: int = 8, layers: int = 6) -> Finding:
    """Decoders of 6 layers and width 64 on the characters of Python's help texts, all with the parameters of the one
    with a learned map for each depth (the others have wider feed-forward parts); nats per character on held-out text.
    Depth use: over held-out tokens, the mean depth read against the loss of the next character."""
    task = LanguageModel()
    task.rows = rows  # type: ignore[misc]

    def shortcut(map: str, hidden: int) -> nn.Module:
        return ShortcutGPT(task.vocabulary, DIM, layers, hidden, task.length, map=map, position=swap.Rope())

    full = count(shortcut("mlp", 4 * DIM))
    models = {
        "plain": lambda seed: host(
            lambda _: swap.Attention(DIM, HEADS, causal=True, position=swap.Rope()), task, seed, DIM, layers, full
        ),
        "shortcuts": lambda seed: build(lambda: shortcut("mlp", 4 * DIM), seed),
        "shortcuts, no maps": lambda seed: build(
            lambda: matched(lambda hidden: shortcut("identity", hidden), full, 4 * DIM), seed
        ),
    }
    sizes: dict[str, int] = {}
    spread: list[float] = []
    agreement: list[float] = []

    def measure(seed: int) -> dict[str, float]:
        nats = {}
        for name, make in models.items():
            model = fitted(make(seed), task, seed, steps)
            sizes[name], nats[name] = count(model), quality(model, task) * math.log(2)
            if name == "shortcuts":
                assert isinstance(model, ShortcutGPT)
                depth, loss = by_token(model, task)
                spread.append(float(depth.std()))
                agreement.append(float(np.corrcoef(depth, loss)[0, 1]))
        return nats

    found = by_seed(measure, tuple(seeds))
    gain = [p - s for p, s in zip(found["plain"], found["shortcuts"], strict=True)]
    holds = min(gain) > 0 and min(spread) > 0 and min(agreement) > 0
    listed = ", ".join(f"{name} {np.mean(x):.3f}" for name, x in found.items())
    return Finding(
        measured={
            "nats": found,
            "parameters": sizes,
            "depth_spread": spread,
            "depth_and_loss": agreement,
        },
        expected=(
            "On every seed a lower loss with shortcuts than plain at equal parameters; the mean depth read varies over "
            "tokens and correlates positively with their loss."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Nats per character after {steps} steps: {listed}; the mean depth (0 first, 1 last but one) varies by "
            f"{np.mean(spread):.3f} over tokens, correlation with the loss {', '.join(f'{x:+.2f}' for x in agreement)}."
        ),
        model=f"decoders of {layers} layers and width {DIM}, trained here",
        seeds=list(seeds),
    )


@torch.no_grad()
def by_token(model: ShortcutGPT, task: LanguageModel) -> tuple[np.ndarray, np.ndarray]:
    """Depth read and loss of every held-out token that has a next one."""
    depths, losses = [], []
    for batch in task.held_out():
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
        depths.append(model.mean_depth(ids)[:, :-1].flatten())
    return torch.cat(depths).numpy(), torch.cat(losses).numpy()
