"""Attention as a step down an energy: iterations whose fixed points are structures inferred with the nodes unknown.

Each kind has `step(z, x) -> z` and `energy(z, x)`; z [slot, dim] are what is inferred, x [token, dim] what is given:

    z = descend(Hopfield(beta=4.0), z, x, steps=10)         # [step + 1, slot, dim]

The weights of `Hopfield` and `Predictive` are normalised over the sources x, as in a transformer; those of `Mixture`
and `Slots` over the targets z, which compete for each source. The two are not to be mixed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.paper import Paper
from headwise.study.finding import Finding
from headwise.study.registry import study

PAPER = Paper("Attention: Marginal Probability is All You Need?", "2304.04556")
Nodes = Float[Tensor, "slot dim"]
Given = Float[Tensor, "token dim"]


class Energy(Protocol):
    def step(self, z: Nodes, x: Given) -> Nodes: ...

    def energy(self, z: Nodes, x: Given) -> Float[Tensor, ""]: ...


def distances(z: Nodes, x: Given) -> Float[Tensor, "slot token"]:
    """|x_j - z_i|^2 / 2."""
    return ((x - z[:, None]) ** 2).sum(-1) / 2


@dataclass(frozen=True)
class Hopfield:
    """`z_i <- sum_j softmax_j(beta z_i . x_j) x_j`; `E = sum_i |z_i|^2 / 2 - log sum_j exp(beta z_i . x_j) / beta`."""

    beta: float = 1.0

    def step(self, z: Nodes, x: Given) -> Nodes:
        return torch.softmax(self.beta * z @ x.T, 1) @ x

    def energy(self, z: Nodes, x: Given) -> Float[Tensor, ""]:
        return (z**2).sum() / 2 - torch.logsumexp(self.beta * z @ x.T, 1).sum() / self.beta


@dataclass(frozen=True)
class Mixture:
    """Expectation-maximisation of a Gaussian mixture with unit variances and equal weights: `r = softmax over
    components i of -|x_j - z_i|^2 / 2`, `z_i <- sum_j r_ij x_j / sum_j r_ij`; `E = -sum_j log sum_i exp(-|x_j - z_i|^2
    / 2)`."""

    def step(self, z: Nodes, x: Given) -> Nodes:
        return share(torch.softmax(-distances(z, x), 0)) @ x

    def energy(self, z: Nodes, x: Given) -> Float[Tensor, ""]:
        return -torch.logsumexp(-distances(z, x), 0).sum()


@dataclass(frozen=True)
class Slots:
    """Slot attention without what it learns (identity projections, no recurrent cell): `r = softmax over slots i of
    z_i . x_j / sqrt(d)`, `z_i <- sum_j r_ij x_j / sum_j r_ij`. It lacks the |z_i|^2 of a mixture's posterior, so that
    its energy, that of the mixture with variance sqrt(d), is a near one and need not fall."""

    def step(self, z: Nodes, x: Given) -> Nodes:
        return share(torch.softmax(z @ x.T / z.shape[1] ** 0.5, 0)) @ x

    def energy(self, z: Nodes, x: Given) -> Float[Tensor, ""]:
        return -torch.logsumexp(-distances(z, x) / z.shape[1] ** 0.5, 0).sum()


@dataclass(frozen=True)
class Predictive:
    """Predictive coding with attention as precision: `z_i <- z_i + rate sum_j p_ij precision_j (x_j - z_i)`, `p_ij` the
    posterior of the source under Gaussians of these precisions around z_i; `E = -sum_i log sum_j exp(d/2 log
    precision_j - precision_j |x_j - z_i|^2 / 2)`. It falls for rates up to 1 / max precision."""

    precision: Float[Tensor, " token"]
    rate: float

    def step(self, z: Nodes, x: Given) -> Nodes:
        pull = torch.softmax(self.log_joint(z, x), 1) * self.precision
        return z + self.rate * (pull @ x - pull.sum(1, keepdim=True) * z)

    def energy(self, z: Nodes, x: Given) -> Float[Tensor, ""]:
        return -torch.logsumexp(self.log_joint(z, x), 1).sum()

    def log_joint(self, z: Nodes, x: Given) -> Float[Tensor, "slot token"]:
        return x.shape[1] / 2 * self.precision.log() - self.precision * distances(z, x)


@dataclass(frozen=True)
class Shuffled(Hopfield):
    """The control: Hopfield steps whose weights go to other sources."""

    order: Int[Tensor, " token"] = field(kw_only=True)

    def step(self, z: Nodes, x: Given) -> Nodes:
        return torch.softmax(self.beta * z @ x.T, 1)[:, self.order] @ x


def share(r: Float[Tensor, "slot token"]) -> Float[Tensor, "slot token"]:
    """Every slot's part of the sources, to sum 1."""
    return r / r.sum(1, keepdim=True)


def descend(kind: Energy, z: Nodes, x: Given, steps: int) -> Float[Tensor, "step slot dim"]:
    """z before the first step and after each."""
    path = [z]
    for _ in range(steps):
        path.append(kind.step(path[-1], x))
    return torch.stack(path)


@study(
    "attention_energies",
    paper=PAPER,
    room="swap",
    claim="Hopfield, mixture and slot attention are steps down an energy: it falls with every iteration.",
)
def attention_energies(seeds: Sequence[int] = (0, 1, 2), trials: int = 50, steps: int = 20) -> Finding:
    """Random starts on 40 points in 8 dims around 4 centres, in float64: the share of steps in which the energy rose
    (by more than rounding), for each kind of iteration, and as a control for Hopfield steps with the weights
    shuffled."""
    rose: dict[str, list[bool]] = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        for _ in range(trials):
            x, z = 2 * normal(4, 8).repeat(10, 1) + normal(40, 8), normal(4, 8)
            precision = torch.rand(40, dtype=torch.float64, generator=generator) + 0.5
            kinds: dict[str, Energy] = {
                "hopfield": Hopfield(),
                "mixture": Mixture(),
                "slots": Slots(),
                "predictive coding": Predictive(precision, 1 / float(precision.max())),
                "shuffled hopfield": Shuffled(order=torch.randperm(40, generator=generator)),
            }
            for name, kind in kinds.items():
                energy = torch.stack([kind.energy(at, x) for at in descend(kind, z, x, steps)])
                rise = energy.diff() > 1e-9 * energy[:-1].abs().clamp(min=1)
                rose.setdefault(name, []).extend(rise.tolist())
    share_of = {name: sum(flags) / len(flags) for name, flags in rose.items()}
    exact = [share_of[name] for name in ("hopfield", "mixture", "predictive coding")]
    holds = max(exact) == 0 and share_of["slots"] == 0
    return Finding(
        measured={"share_of_rises": share_of},
        expected="No step of the Hopfield, mixture, slot and predictive iterations raises its energy.",
        verdict="holds" if holds else "fails",
        reason=(
            "Share of steps in which the energy rose: "
            + ", ".join(f"{name} {value:.1%}" for name, value in share_of.items())
            + (
                ". Slot attention has no energy of its own; it is measured on that of the nearest mixture."
                if share_of["slots"]
                else "."
            )
        ),
        model="points drawn at random",
        seeds=list(seeds),
    )
