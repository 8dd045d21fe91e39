"""What do fewer key-value heads cost, and can those of a trained model be merged?"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import nn

from headwise import swap
from headwise.models import Opened, open_model
from headwise.scan.needles import haystack
from headwise.study.bench_tasks import TASKS, quality
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.swap_train import by_seed, count, fitted, host, pair_bits

PAPER = swap.MultiQueryAttention.paper
HEADS, DIM = 8, 64


@study(
    "multi_query",
    paper=PAPER,
    room="swap",
    claim="One key-value head for all queries costs little quality, far less than having one head alone.",
)
def multi_query(seeds: Sequence[int] = (0, 1, 2), steps: int = 1000, tuning: int = 100, rows: int = 16) -> Finding:
    """Decoders of 2 layers, width 64 and 8 heads on the characters of Python's help texts, with 8, 2 and 1 key-value
    heads, and with a single head of the same width; parameters are equal through the feed-forward part. Bits per
    character on held-out text. Then the key-value heads of the trained model with 8 of them are merged to one by their
    mean, by the first of them, or replaced by random ones, and tuned.

    In a first run of 300 steps on average none was better than a table of character pairs. The steps were then chosen
    by the loss with 8 key-value heads alone, and "untestable" added for the case that it is no better than that table;
    the rest of the rule is the first. Some 8 processor minutes."""

    task = TASKS["lm"]()
    task.rows = rows  # type: ignore[misc]
    kinds = {"8": (HEADS, 8), "2": (HEADS, 2), "1": (HEADS, 1), "single head": (1, 1)}

    def layer(heads: int, kv_heads: int) -> swap.MultiQueryAttention:
        return swap.MultiQueryAttention(DIM, heads, kv_heads, DIM // HEADS, causal=True)

    full = count(host(lambda _: layer(HEADS, 8), task))
    sizes: dict[str, int] = {}

    def measure(seed: int) -> dict[str, float]:
        found = {}
        for name, kind in kinds.items():
            model = fitted(host(lambda _, kind=kind: layer(*kind), task, seed, DIM, parameters=full), task, seed, steps)  # type: ignore[misc]
            found[name], sizes[name] = quality(model, task), count(model)
            if name == "8":
                whole = model
        for init in ("mean", "first", "random"):
            model = deepcopy(whole)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                merge(model, init)
            found[f"merged by {init}"] = quality(model, task)
            found[f"{init}, tuned"] = quality(fitted(model, task, seed + 100, tuning, 1e-3), task)
        found["8, tuned"] = quality(fitted(whole, task, seed + 100, tuning, 1e-3), task)
        return found

    bits = by_seed(measure, tuple(seeds))
    mean = {name: float(np.mean(values)) for name, values in bits.items()}
    lost = mean["1"] - mean["8"]
    alone = mean["single head"] - mean["8"]
    worse = all(one < single for one, single in zip(bits["1"], bits["single head"], strict=True))
    closed = 1 - (mean["mean, tuned"] - mean["8, tuned"]) / (mean["merged by mean"] - mean["8"])
    pairs = pair_bits(task)
    holds = worse and lost <= alone / 2 and closed >= 0.5
    return Finding(
        measured={
            "bits_per_character": bits,
            "mean": mean,
            "parameters": sizes,
            "cached_numbers_per_token_and_layer": {n: layer(*kind).cached_per_token for n, kind in kinds.items()},
            "gap_closed_by_tuning": closed,
            "pair_table": pairs,
        },
        expected=(
            "On every seed one key-value head is better than a single head, on average it loses at most half of what "
            "a single head does, and tuning closes at least half of the gap that merging by the mean opens "
            "(to the unmerged one, tuned alike). Untestable where 8 key-value heads are not below a table of character "
            "pairs."
        ),
        verdict="untestable" if mean["8"] >= pairs else "holds" if holds else "fails",
        reason=(
            f"{mean['8']:.3f} bits per character with 8 key-value heads, {mean['2']:.3f} with 2, {mean['1']:.3f} "
            f"with 1, {mean['single head']:.3f} with a single head, {pairs:.3f} a table of pairs. "
            f"Merged to one: {mean['merged by mean']:.2f} by the mean, {mean['merged by first']:.2f} by the first, "
            f"{mean['merged by random']:.2f} random; {tuning} steps of tuning close {closed:.0%} of the mean's gap."
        ),
        model=f"decoders of 2 layers, trained for {steps} steps",
        seeds=list(seeds),
    )


def merge(model: nn.Module, init: str) -> None:
    for module in list(model.modules()):
        if isinstance(module, swap.Attention):
            swap.merge_kv_heads(module, 1, init)  # type: ignore[arg-type]


@study(
    "kv_heads_merged",
    paper=PAPER,
    room="swap",
    claim="Key-value heads of a trained model are best merged by their mean; the first is worse, random weights worst.",
)
def kv_heads_merged(model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), tokens: int = 512) -> Finding:
    """The loss on a text after the key-value heads of every layer became one, without tuning. The rule compares them by
    their losses alone, however high: what tuning makes of them is another study's."""
    opened = model if isinstance(model, Opened) else open_model(model)
    ids = opened.encode(haystack(), truncation=True, max_length=tokens)["input_ids"]
    loss = {"as it was": language_loss(opened, ids)}
    for init in ("mean", "first"):
        with swap.convert(opened, swap.MultiQueryAttention, init=init):
            loss[init] = language_loss(opened, ids)
    drawn = []
    for seed in seeds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with swap.convert(opened, swap.MultiQueryAttention, init="random"):
                drawn.append(language_loss(opened, ids))
    loss["random"] = float(np.mean(drawn))
    heads = opened.sites[0].kv_heads
    holds = loss["mean"] < loss["first"] < min(drawn)
    return Finding(
        measured={"loss": loss, "loss_random": drawn, "kv_heads": heads},
        expected="The loss is lowest after merging by the mean, then by the first, and with random weights highest.",
        verdict="holds" if holds else "fails",
        reason=(
            f"{heads} key-value heads a layer made one: from {loss['as it was']:.2f} nats to {loss['mean']:.2f} by the "
            f"mean, {loss['first']:.2f} by the first, {loss['random']:.2f} with random weights."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


@torch.no_grad()
def language_loss(opened: Opened, ids: torch.Tensor) -> float:
    return opened.model(input_ids=ids, labels=ids, use_cache=False).loss.item()
