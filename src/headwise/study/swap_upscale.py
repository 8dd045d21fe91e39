"""Layers added to a trained decoder: memories for each head, against copies of whole layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from headwise import swap
from headwise.study.bench_tasks import LanguageModel, quality
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.swap_train import by_seed
from headwise.study.train import Draw, Recipe, build, train

DIM, HEADS, LAYERS = 64, 4, 4


def decoder(vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=DIM, intermediate_size=3 * DIM, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@study(
    "memory_upscaling",
    paper=swap.MemoryBlock.paper,
    room="swap",
    claim="Blocks of head-wise memories help a trained decoder as much as copied layers, with fewer parameters.",
)
def memory_upscaling(
    seeds: Sequence[int] = (0, 1, 2), steps: int = 300, more: int = 200, rows: int = 8, n: int = 44
) -> Finding:
    """A decoder of 4 layers and width 64 learns one half of Python's help texts, character by character, for 300 steps;
    then 2 new blocks, behind layers 2 and 4, learn the other half for 200 with everything else frozen: memories, copies
    that start as the identity, and memories whose heads share their keys. Nats per character on the held-out tenth.
    The paper up-scales a model of 1 billion parameters on 2 billion tokens."""
    task = LanguageModel()
    task.rows = rows  # type: ignore[misc]
    half = len(task.training) // 2

    def draw(first: int, last: int) -> Draw:
        return lambda generator: task.windows(task.training[first:last], generator)

    bank = {"n": n, "topk": min(8, n)}
    arms: dict[str, dict[str, Any]] = {
        "memory": {"kind": "memory", **bank},
        "identity copy": {"kind": "identity_copy"},
        "memory, shared keys": {"kind": "memory", "shared_keys": True, **bank},
    }
    sizes: dict[str, int] = {}
    heads: list[list[list[float]]] = []
    used: list[float] = []

    def measure(seed: int) -> dict[str, float]:
        base = build(lambda: decoder(task.vocabulary), seed)
        train(base, draw(0, half), Recipe(steps, 3e-3, warmup=steps // 10, decay="cosine", seed=seed))
        nats = {"base": nll(base, task)}
        for name, how in arms.items():
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                upscaled = swap.depth_upscale(base, **how)
            with upscaled:
                sizes[name] = sum(p.numel() for p in base.parameters() if p.requires_grad)
                recipe = Recipe(more, 3e-3, warmup=more // 10, decay="cosine", seed=seed)
                train(base, draw(half, len(task.training)), recipe)
                nats[name] = nll(base, task)
                if name == "memory":
                    heads.append(knocked_out(upscaled, lambda: nll(base, task) - nats["memory"]))
                    used.append(usage(upscaled, task, n))
        return nats

    found = by_seed(measure, tuple(seeds))
    loss = {name: float(np.mean(x)) for name, x in found.items()}
    best = loss["memory"] <= loss["identity copy"] < loss["base"] and sizes["memory"] < sizes["identity copy"]
    own = loss["memory"] < loss["memory, shared keys"]
    spread = [max(flat) / max(np.median(flat), 1e-9) for flat in (np.ravel(x) for x in heads)]
    holds = best and own and min(spread) >= 2 and min(used) > 0.5
    return Finding(
        measured={
            "nats": loss,
            "nats_by_seed": found,
            "trained_parameters": sizes,
            "nats_lost_without_a_head": heads,
            "slots_used": used,
        },
        expected=(
            "Mean losses: memory at most that of identity copies, both below the frozen base, with fewer trained "
            "parameters; memory below memory with shared keys. On every seed the most important head's memory is worth "
            "at least twice the median one's, and more than half of the slots are read."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Nats per character: base {loss['base']:.3f}, "
            + ", ".join(f"{name} {loss[name]:.3f} ({sizes[name]:,} trained)" for name in arms)
            + f". The most important head's memory is worth {min(spread):.1f} to {max(spread):.1f} times the median "
            f"one's; {min(used):.0%} to {max(used):.0%} of the slots are read."
        ),
        model=f"decoders of {LAYERS} layers and width {DIM}, trained here",
        seeds=list(seeds),
    )


def nll(model: nn.Module, task: LanguageModel) -> float:
    return quality(model, task) * math.log(2)


def knocked_out(upscaled: swap.Upscaled, lost: Callable[[], float]) -> list[list[float]]:
    """What is lost without the memory of each head: [block][head]."""
    rows = []
    for block in upscaled.blocks:
        assert isinstance(block, swap.MemoryBlock)
        row = []
        for head in range(HEADS):
            block.gain[head] = 0.0
            row.append(lost())
            block.gain[head] = 1.0
        rows.append(row)
    return rows


@torch.no_grad()
def usage(upscaled: swap.Upscaled, task: LanguageModel, n: int) -> float:
    """Share of the slots that some head reads on the held-out text, mean over blocks."""
    read = torch.zeros(len(upscaled.blocks), n * n, dtype=torch.bool)
    hooks = []
    for number, block in enumerate(upscaled.blocks):
        assert isinstance(block, swap.MemoryBlock)

        def seen(_module: nn.Module, _args: tuple, out: Any, number: int = number) -> None:
            read[number, out[1].flatten()] = True

        hooks.append(block.memory.register_forward_hook(seen))
    try:
        nll(upscaled.model, task)
    finally:
        for hook in hooks:
            hook.remove()
    return read.double().mean().item()
