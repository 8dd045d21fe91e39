"""Is a part of the heads enough, if each token picks its own, and can a trained model be turned to that?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise import swap
from headwise.models import Opened, open_model
from headwise.scan.needles import haystack
from headwise.study.bench_tasks import TASKS, BenchTask, quality
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.swap_train import by_seed, count, fitted, host

PAPER = swap.MixtureOfHeadAttention.paper
DIM, HEADS, LAYERS, SHARED, PICKED = 64, 8, 2, 4, 2


class Static(swap.MixtureOfHeadAttention):
    """The same heads for every token: the first ones."""

    def norm_gates(self, q: Tensor) -> Tensor:
        gates = q.new_zeros(q.shape[0], q.shape[2], self.heads)
        gates[..., : self.shared + self.topk] = 1.0
        return gates


class Drawn(swap.MixtureOfHeadAttention):
    """Others than the shared heads drawn anew for every token."""

    def norm_gates(self, q: Tensor) -> Tensor:
        noise = torch.rand(q.shape[0], q.shape[2], self.heads - self.shared, device=q.device)
        picked = torch.zeros_like(noise).scatter(-1, noise.topk(self.topk, -1).indices, 1.0)
        return torch.cat([torch.ones_like(noise[..., :1]).expand(-1, -1, self.shared), picked], -1).to(q.dtype)


ROUTERS = {"norms of queries": swap.MixtureOfHeadAttention, "drawn": Drawn, "static": Static}


@study(
    "mixture_of_heads",
    paper=PAPER,
    room="swap",
    claim="Three quarters of the heads, picked by each token, are as good as all of them; balance keeps all in use.",
)
def mixture_of_heads(seeds: Sequence[int] = (0, 1, 2), steps: int = 300, rows: int = 16) -> Finding:
    """Decoders of 2 layers, width 64 and 8 heads (4 shared, 2 picked) on the characters of Python's help texts, with
    equal parameters through the feed-forward part. Bits per character on held-out text. Use: the entropy of how often
    each head that can be picked is, 1 where all are picked alike, with the balance loss and without."""
    task = TASKS["lm"]()
    task.rows = rows  # type: ignore[misc]

    def mixture(weight: float) -> swap.Mechanism:
        return swap.MixtureOfHeadAttention(
            DIM, HEADS, causal=True, shared=SHARED, topk=PICKED, balance_weight=weight / LAYERS
        )

    full = count(host(lambda _: swap.Attention(DIM, HEADS, causal=True), task, 0, DIM, LAYERS))

    def measure(seed: int) -> dict[str, float]:
        plain = host(lambda _: swap.Attention(DIM, HEADS, causal=True), task, seed, DIM, LAYERS)
        found = {"all heads": quality(fitted(plain, task, seed, steps), task)}
        for name, weight in (("mixture", 0.01), ("mixture, no balance", 0.0)):
            made = host(lambda _, weight=weight: mixture(weight), task, seed, DIM, LAYERS, full)  # type: ignore[misc]
            found[name] = quality(fitted(made, task, seed, steps), task)
            found[f"use, {name}"] = use(made, task)
        return found

    found = by_seed(measure, tuple(seeds))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    holds = mean["mixture"] - mean["all heads"] <= 0.02 and mean["use, mixture"] > mean["use, mixture, no balance"]
    return Finding(
        measured={"seeds": found, "mean": mean, "active": (SHARED + PICKED) / HEADS, "parameters": full},
        expected=(
            "With 75% of the heads at most 0.02 bits worse than with all, and used more evenly than without balance."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"{mean['all heads']:.3f} bits per character with all heads, {mean['mixture']:.3f} with 6 of 8 picked by "
            f"each token, {mean['mixture, no balance']:.3f} without balance; evenness of use "
            f"{mean['use, mixture']:.3f} and {mean['use, mixture, no balance']:.3f} without."
        ),
        model=f"decoders of {LAYERS} layers, trained for {steps} steps",
        seeds=list(seeds),
    )


@torch.no_grad()
def use(model: nn.Module, task: BenchTask) -> float:
    """Mean over layers: the entropy of how often each head that can be picked is, divided by its maximum."""
    layers = [m for m in model.modules() if isinstance(m, swap.MixtureOfHeadAttention)]
    often = torch.zeros(len(layers), HEADS - SHARED)
    for batch in task.held_out():
        model(**batch)
        often += torch.stack([(m.gates[..., SHARED:] > 0).float().sum((0, 1)) for m in layers])  # type: ignore[index]
    share = often / often.sum(-1, keepdim=True)
    return float(torch.special.entr(share).sum(-1).mean() / np.log(HEADS - SHARED))


@study(
    "mixture_of_heads_conversion",
    paper=PAPER,
    room="swap",
    claim="After some tuning a trained model goes on with three quarters of its heads, picked by norms of queries.",
)
def mixture_of_heads_conversion(
    model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), steps: int = 300, tuning: int = 100, rows: int = 16
) -> Finding:
    """A small decoder trained with all 8 heads keeps its weights and gets a router (4 heads shared, 2 of the others by
    the norms of a token's queries; or drawn anew for every token; or the same 2 always), and is tuned. Bits per
    character on held-out text, against the plain model tuned as long. Beside it, without tuning, the loss of the real
    model on a text."""
    task = TASKS["lm"]()
    task.rows = rows  # type: ignore[misc]

    def measure(seed: int) -> dict[str, float]:
        plain = fitted(
            host(lambda _: swap.Attention(DIM, HEADS, causal=True), task, seed, DIM, LAYERS), task, seed, steps
        )
        found = {"all heads": quality(plain, task)}
        for name, kind in ROUTERS.items():
            made = host(
                lambda _, kind=kind: kind(DIM, HEADS, causal=True, shared=SHARED, topk=PICKED, router="qnorm"),  # type: ignore[misc]
                task, seed, DIM, LAYERS,
            )  # fmt: skip
            made.load_state_dict(plain.state_dict())
            found[name] = scored(made, task, seed)
            fitted(made, task, seed + 100, tuning, 1e-3)
            found[f"{name}, tuned"] = scored(made, task, seed)
        found["all heads, tuned"] = quality(fitted(plain, task, seed + 100, tuning, 1e-3), task)
        return found

    bits = by_seed(measure, tuple(seeds))
    mean = {name: float(np.mean(values)) for name, values in bits.items()}
    ours = "norms of queries"
    closed = 1 - (mean[f"{ours}, tuned"] - mean["all heads, tuned"]) / (mean[ours] - mean["all heads"])
    ahead = mean[f"{ours}, tuned"] < min(mean["drawn, tuned"], mean["static, tuned"])
    opened = model if isinstance(model, Opened) else open_model(model)
    loss = untuned(opened)
    return Finding(
        measured={"bits_per_character": bits, "mean": mean, "gap_closed_by_tuning": closed, "real_model_loss": loss},
        expected=(
            "Tuning closes at least half of the gap that routing by norms opens, and leaves it better than heads drawn "
            "at random and than the same heads always."
        ),
        verdict="holds" if closed >= 0.5 and ahead else "fails",
        reason=(
            f"From {mean['all heads']:.3f} bits to {mean[ours]:.3f} by norms, {mean['drawn']:.3f} drawn, "
            f"{mean['static']:.3f} static; tuned {mean[f'{ours}, tuned']:.3f}, {mean['drawn, tuned']:.3f}, "
            f"{mean['static, tuned']:.3f}, all heads {mean['all heads, tuned']:.3f}: {closed:.0%} of the gap closed. "
            f"{opened.name} untuned: from {loss['all heads']:.2f} nats to {loss[ours]:.2f} by norms, "
            f"{loss['drawn']:.2f} drawn, {loss['static']:.2f} static."
        ),
        model=f"decoders of {LAYERS} layers, trained for {steps} steps; {opened.name}",
        seeds=list(seeds),
    )


def scored(model: nn.Module, task: BenchTask, seed: int) -> float:
    """With random heads drawn from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return quality(model, task)


@torch.no_grad()
def untuned(opened: Opened, tokens: int = 512) -> dict[str, float]:
    """The loss of a model on a text with all heads and with three quarters of them, routed in each way."""
    ids = opened.encode(haystack(), truncation=True, max_length=min(tokens, opened.max_positions or tokens))[
        "input_ids"
    ]

    def loss() -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return opened.model(input_ids=ids, labels=ids, use_cache=False).loss.item()

    found = {"all heads": loss()}
    for name, kind in ROUTERS.items():
        with swap.convert(opened, kind):
            found[name] = loss()
    return found
