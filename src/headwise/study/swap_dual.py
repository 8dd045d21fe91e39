"""Do heads that carry comparisons learn relations from fewer examples, and do they help a language model?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise import swap
from headwise.study.bench_tasks import TASKS, quality
from headwise.study.finding import Finding
from headwise.study.hosts import Vectors, matched
from headwise.study.registry import study
from headwise.study.swap_train import by_seed, count, fitted, host
from headwise.study.train import Draw, Recipe, build, train

PAPER = swap.DualAttention.paper
DIM, HEADS, WIDTH, OBJECTS = 32, 4, 16, 24
Game = Callable[[Tensor, Tensor], Tensor]
"""Numbers of distinct objects [row, object] and wanted answers [row] (bools) -> the objects shown [row, place]."""


def same(o: Tensor, yes: Tensor) -> Tensor:
    """Two objects: are they the same?"""
    return torch.stack([o[:, 0], torch.where(yes, o[:, 0], o[:, 1])], 1)


def all_different(o: Tensor, yes: Tensor) -> Tensor:
    """Four objects, or two of them the same."""
    return torch.stack([o[:, 0], o[:, 1], o[:, 2], torch.where(yes, o[:, 3], o[:, 0])], 1)


def match_pattern(o: Tensor, yes: Tensor) -> Tensor:
    """Two triples out of ABA and ABB, each of other objects: are they the same pattern?"""
    first = o[:, 6] % 2 == 0
    second = first == yes
    one = [o[:, 0], o[:, 1], torch.where(first, o[:, 0], o[:, 1])]
    two = [o[:, 2], o[:, 3], torch.where(second, o[:, 2], o[:, 3])]
    return torch.stack(one + two, 1)


def between(o: Tensor, yes: Tensor) -> Tensor:
    """Three objects: does the middle one stand between two that are the same?"""
    other = torch.where(o[:, 6] % 2 == 0, o[:, 1], o[:, 2])
    return torch.stack([o[:, 0], o[:, 1], torch.where(yes, o[:, 0], other)], 1)


GAMES: dict[str, Game] = {
    "same": same,
    "all different": all_different,
    "match pattern": match_pattern,
    "between": between,
}


def played(game: Game, rows: int, objects: Tensor, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, len(objects), generator=generator).argsort(1)
    yes = torch.rand(rows, generator=generator) < 0.5
    x = objects[game(order, yes)]
    x = x[torch.arange(rows)[:, None], torch.rand(x.shape[:2], generator=generator).argsort(1)] if game in LOOSE else x
    return {"x": x, "labels": yes.long()}


LOOSE = (same, all_different)
"""Games in which places mean nothing: the objects are shown in a random order."""


@study(
    "dual_attention_relations",
    paper=PAPER,
    room="swap",
    claim="With few examples dual attention learns relations of objects better than attention of equally many weights.",
)
def dual_attention_relations(
    seeds: Sequence[int] = (0, 1, 2), samples: Sequence[int] = (250, 1000), steps: int = 150
) -> Finding:
    """Four games after those of the paper's relational games (same, all different, match pattern, between), with random
    vectors for pictures. Encoders of two layers, width 32 and 4 heads, of which none, half or all are relational; all
    with equally many parameters. Trained on 24 objects, asked about 24 others."""
    kinds = {"none": 0, "half": HEADS // 2, "all": HEADS}

    def encoder(relational: int, length: int, hidden: int) -> nn.Module:
        library = swap.SymbolicAttention(DIM, 2, 16) if relational else None

        def layer(_: int) -> nn.Module:
            if library is None:
                return swap.Attention(DIM, HEADS)
            return swap.DualAttention(DIM, HEADS, relational=relational, symbols=library)

        return Vectors(layer, WIDTH, DIM, 2, 2, length, hidden)

    right: dict[str, dict[str, list[list[float]]]] = {str(n): {kind: [] for kind in kinds} for n in samples}
    for seed in seeds:
        objects = torch.randn(2 * OBJECTS, WIDTH, generator=torch.Generator().manual_seed(seed))
        for n in samples:
            rows: dict[str, list[float]] = {kind: [] for kind in kinds}
            for game in GAMES.values():
                known = played(game, n, objects[:OBJECTS], 1000 + seed)
                asked = played(game, 1000, objects[OBJECTS:], 2000 + seed)
                length = known["x"].shape[1]
                full = count(encoder(0, length, 4 * DIM))
                for kind, relational in kinds.items():
                    model = build(partial(matched, partial(encoder, relational, length), full, 4 * DIM), seed)
                    train(model, some(known, 64), Recipe(steps, 2e-3, warmup=steps // 10, decay="cosine", seed=seed))
                    with torch.no_grad():
                        hits = model(x=asked["x"]).logits.argmax(-1) == asked["labels"]
                    rows[kind].append(float(hits.float().mean()))
            for kind in kinds:
                right[str(n)][kind].append(rows[kind])
    mean = {n: {kind: np.mean(rows, 1).tolist() for kind, rows in found.items()} for n, found in right.items()}
    few = mean[str(min(samples))]
    holds = all(half > none for half, none in zip(few["half"], few["none"], strict=True))
    listed = "; ".join(
        f"{n} examples: " + ", ".join(f"{kind} {np.mean(values):.1%}" for kind, values in found.items())
        for n, found in mean.items()
    )
    return Finding(
        measured={"accuracy": right, "mean_by_seed": mean, "games": list(GAMES), "chance": 0.5},
        expected=(
            f"With {min(samples)} examples half relational heads are right more often than none, averaged over the "
            "games, on every seed."
        ),
        verdict="holds" if holds else "fails",
        reason=f"Right about new objects, averaged over games and seeds, by how many heads are relational: {listed}.",
        model=f"encoders of two layers and width {DIM}, trained for {steps} steps",
        seeds=list(seeds),
    )


def some(known: dict[str, Tensor], rows: int) -> Draw:
    """Batches out of fixed examples."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(known["labels"]), (rows,), generator=generator)
        return {name: tensor[chosen] for name, tensor in known.items()}

    return draw


@study(
    "dual_attention_language",
    paper=PAPER,
    room="swap",
    claim="Half relational heads lower a small language model's loss at an equal number of parameters.",
)
def dual_attention_language(seeds: Sequence[int] = (0, 1, 2), steps: int = 300) -> Finding:
    """Characters of Python's help texts (task `lm` of the swap bench), two layers of width 64 and 8 heads: all
    ordinary, 4 of them relational, and 4 with symbols but no relations. Bits per character on held-out text."""
    task, dim = TASKS["lm"](), 64

    def layer(**own: Any) -> Callable[[int], nn.Module]:
        library = swap.SymbolicAttention(dim, 4, 64)
        return lambda _: swap.DualAttention(dim, 8, causal=True, symbols=library, **own)

    makes: dict[str, Callable[[], Callable[[int], nn.Module]]] = {
        "8 ordinary": lambda: lambda _: swap.Attention(dim, 8, causal=True),
        "4 ordinary, 4 relational": layer,
        "4 ordinary, 4 of symbols": lambda: layer(relations=0),
    }
    full = count(host(makes["8 ordinary"](), task, dim=dim))

    def measure(seed: int) -> dict[str, float]:
        found = {}
        for name, make in makes.items():
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # the library is made here
                model = host(make(), task, seed, dim, parameters=full)
            found[name] = quality(fitted(model, task, seed, steps), task)
        return found

    bits = by_seed(measure, tuple(seeds))
    plain, dual, symbols = bits.values()
    holds = all(a < b for a, b in zip(dual, plain, strict=True))
    return Finding(
        measured={"bits_per_character": bits, "parameters": full, "chance": task.chance},
        expected="On every seed the model with 4 relational heads of 8 needs fewer bits per character.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Bits per character after {steps} steps: {np.mean(plain):.3f} with ordinary heads, {np.mean(dual):.3f} "
            f"with half relational ones, {np.mean(symbols):.3f} with symbols alone; the largest difference between "
            f"seeds is {max(max(v) - min(v) for v in bits.values()):.3f}."
        ),
        model=f"two-layer decoders of {full:,} parameters, trained here",
        seeds=list(seeds),
    )
