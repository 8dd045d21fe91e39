"""LayerNorm's two gifts to attention: every key can be chosen, and all keys can be averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from headwise import scan
from headwise.models import Opened, open_model
from headwise.scan.unselectable import PAPER
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.score_rank import one_input
from headwise.swap.factorized_norm import FactorizedLayerNorm


@study(
    "unselectable_points",
    paper=PAPER,
    room="scan",
    claim="Without a norm many keys can be chosen by no query; LayerNorm's scaling makes every key selectable.",
)
def unselectable_points(
    dims: Sequence[int] = (2, 4, 6, 8), counts: Sequence[int] = (10, 30, 60, 120), seeds: Sequence[int] = (0, 1, 2)
) -> Finding:
    """Share of unselectable points among n drawn uniformly from the unit cube of d dimensions: as they are, with the
    mean taken off only, and after LayerNorm."""
    kinds = {"plain": {"project": False, "scale": False}, "projected": {"scale": False}, "layer_norm": {}}
    share = {kind: np.zeros((len(dims), len(counts))) for kind in kinds}
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        for row, dim in enumerate(dims):
            for column, count in enumerate(counts):
                points = torch.rand(count, dim, generator=draw, dtype=torch.float64)
                for kind, halves in kinds.items():
                    normed = FactorizedLayerNorm(dim, affine=False, **halves)(points)
                    share[kind][row, column] += scan.unselectable(normed).double().mean().item() / len(seeds)
    plain = share["plain"]
    grows = bool((np.diff(plain, axis=1) >= -0.02).all()) and bool((np.diff(plain, axis=0) <= 0.02).all())
    holds = grows and plain.max() > 0.5 and share["layer_norm"].max() == 0
    return Finding(
        measured={"dims": list(dims), "points": list(counts), **share},
        expected="Grows with the number of points and falls with dimensions (within 0.02); exactly 0 after LayerNorm.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Of {counts[-1]} points in {dims[0]} dimensions {plain[0, -1]:.0%} are unselectable, in {dims[-1]} "
            f"{plain[-1, -1]:.0%}; with the mean off {share['projected'][0, -1]:.0%} and "
            f"{share['projected'][-1, -1]:.0%}; after LayerNorm at most {share['layer_norm'].max():.0%}."
        ),
        model="points uniform in a cube",
        seeds=seeds,
    )


@study(
    "unselectable_models",
    paper=PAPER,
    room="scan",
    claim="In trained models every token is selectable once normalised.",
)
def unselectable_models(models: Sequence[Any] = ("zoo:encoder", "zoo:vit"), tokens: int = 256) -> Finding:
    """Tokens of one text or picture in front of each layer's attention, before and after its norm, and the keys of each
    head, which no norm guards. The angles of the heads' queries to the uniform query are reported beside."""
    rows = {}
    for given in models:
        opened = given if isinstance(given, Opened) else open_model(given)
        batch, _ = one_input(opened, tokens)
        found = scan.heads(opened, inputs=[batch], questions=[scan.UnselectableKeys(keys=tokens), scan.UniformQuery()])
        table = found.heads
        rows[opened.name] = {
            "before": found.data["unselectable_before"].max().item(),
            "after": found.data["unselectable_after"].max().item(),
            "head_keys": table["unselectable_keys"].mean(),
            "head_keys_highest": table["unselectable_keys"].max(),
            "angle_smallest": table["uniform_query"].min(),
            "angle_median": table["uniform_query"].median(),
        }
    holds = all(row["after"] == 0 for row in rows.values())
    named = "; ".join(
        f"{name}: before the norm {row['before']:.1%}, after {row['after']:.1%}, keys of heads {row['head_keys']:.1%} "
        f"on average and {row['head_keys_highest']:.1%} at most"
        for name, row in rows.items()
    )
    return Finding(
        measured=rows,
        expected="No unselectable token after the norm in front of any layer's attention.",
        verdict="holds" if holds else "fails",
        reason=f"{named}. Where none is unselectable before the norm either, the many dimensions see to it.",
        model=", ".join(rows),
    )


class Majority(nn.Module):
    """An embedding, one pre-norm encoder block of one head, and the embedding again as classifier."""

    def __init__(self, classes: int, dim: int, project: bool):
        super().__init__()
        self.embed = nn.Embedding(classes, dim)
        self.norm1 = FactorizedLayerNorm(dim, project=project, affine=False)
        self.norm2 = nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in "qkv")
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, ids: Int[Tensor, "row token"]) -> Float[Tensor, "row token class_"]:
        x = self.embed(ids)
        z = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(z), self.k(z), self.v(z)))
        return (x + self.mlp(self.norm2(x))) @ self.embed.weight.T

    @torch.no_grad()
    def angle(self, ids: Int[Tensor, "row token"]) -> float:
        """Mean folded angle of the effective queries to the ones vector, in degrees."""
        effective = self.q(self.norm1(self.embed(ids))) @ self.k.weight
        cosine = F.cosine_similarity(effective, torch.ones_like(effective), dim=-1)
        return torch.rad2deg(torch.acos(cosine.abs().clamp(max=1))).mean().item()


def majority_batch(
    rows: int, classes: int, length: int, draw: torch.Generator
) -> tuple[Int[Tensor, "row token"], Int[Tensor, " row"]]:
    """Rows of tokens of which one class is ahead of the next by at least 6: counts from a random cut, 6 more tokens
    given to the first, shuffled."""
    rest = length - 6
    cuts = torch.rand(rows, classes, generator=draw).pow(2)  # uneven shares
    other = torch.multinomial(cuts / cuts.sum(-1, keepdim=True), rest, replacement=True, generator=draw)
    winner = F.one_hot(other, classes).sum(1).argmax(-1)
    ids = torch.cat([other, winner[:, None].expand(-1, 6)], 1)
    order = torch.rand(rows, length, generator=draw).argsort(-1)
    return ids.gather(1, order), winner


def train_majority(
    project: bool, seed: int, steps: int, rows: int, classes: int, length: int, every: int
) -> tuple[list[float], float]:
    """Accuracy on held-out rows every so many steps, and the angle at the end."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Majority(classes, 8, project)
    test, answer = majority_batch(1000, classes, length, torch.Generator().manual_seed(10_000 + seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    accuracy = []
    for step in range(1, steps + 1):
        ids, label = majority_batch(rows, classes, length, draw)
        loss = F.cross_entropy(model(ids).flatten(0, 1), label.repeat_interleave(length))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0:
            with torch.no_grad():
                accuracy.append((model(test).argmax(-1) == answer[:, None]).float().mean().item())
    return accuracy, model.angle(test)


@study(
    "majority_projection",
    paper=PAPER,
    room="scan",
    claim="With LayerNorm's projection a small model learns to find the majority token sooner, by uniform queries.",
)
def majority_projection(
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 1500,
    rows: int = 256,
    classes: int = 20,
    length: int = 50,
    every: int = 50,
) -> Finding:
    """50 tokens of 20 classes, the most frequent one is the answer at every place; fresh rows each step, 8 dimensions,
    one head, Adam 5e-3 with linear decay: a shorter training than the paper's (100,000 stored rows, 1,000 epochs).
    Steps until 99% on held-out rows, with the projection and without (scaling in both)."""
    measured: dict[str, Any] = {}
    for name, project in (("projected", True), ("not_projected", False)):
        runs = [train_majority(project, seed, steps, rows, classes, length, every) for seed in seeds]
        reached = [next(((n + 1) * every for n, a in enumerate(run) if a >= 0.99), None) for run, _ in runs]
        measured[name] = {
            "steps_to_99": reached,
            "accuracy": [run[-1] for run, _ in runs],
            "angle": [angle for _, angle in runs],
        }
    with_, without = measured["projected"], measured["not_projected"]
    never = steps + every
    sooner = [(a or never) < (b or never) for a, b in zip(with_["steps_to_99"], without["steps_to_99"], strict=True)]
    smaller = [a < b for a, b in zip(with_["angle"], without["angle"], strict=True)]
    holds = all(sooner) and all(smaller)
    return Finding(
        measured=measured,
        expected="On every seed 99% in fewer steps, and a smaller angle to the uniform query, than without projection.",
        verdict="holds" if holds else "fails",
        reason=(
            f"99% after {with_['steps_to_99']} steps with projection and {without['steps_to_99']} without (None: "
            f"not in {steps}); angles {[round(a) for a in with_['angle']]} and "
            f"{[round(a) for a in without['angle']]} degrees; accuracy at the end "
            f"{np.mean(with_['accuracy']):.3f} and {np.mean(without['accuracy']):.3f}."
        ),
        model="one encoder block of 8 dimensions, trained here",
        seeds=seeds,
    )
