"""JoMA's dynamics in the small: attention as a function of the weights above it, and entropy that falls and rises.

Setting: a query attends to M contextual tokens with logits z; class i has token frequencies x_i. Attended frequencies
`b_i = x_i exp(z / T) / sum`, features `f_i = U b_i + u_q` with orthonormal embeddings, outputs `W^T f_i`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from headwise.errors import HeadwiseError
from headwise.scan.trajectory import PAPER
from headwise.study.finding import Finding
from headwise.study.registry import study


class Invariance(NamedTuple):
    """Along the steps: z less where it started, its prediction, and the prediction's first term alone."""

    z: Float[np.ndarray, "step token"]
    predicted: Float[np.ndarray, "step token"]
    squares: Float[np.ndarray, "step token"]

    def correlation(self, part: str = "predicted") -> Float[np.ndarray, " step"]:
        """Over tokens, from the first step on."""
        pairs = zip(self.z[1:], getattr(self, part)[1:], strict=True)
        return np.array([np.corrcoef(z, predicted)[0, 1] for z, predicted in pairs])


@study(
    "joma_invariance",
    paper=PAPER,
    room="scan",
    claim="All through training the attention logits are a fixed function of the weights above: they can be left out.",
)
def joma_invariance(seeds: Sequence[int] = range(3), steps: int = 2000) -> Finding:
    """Correlation over tokens of what z has gained since the start with what `sum_k (v_k^2 - |v_k|^2 x_mean) / 2T` has,
    v_k = U^T w_k, after every step of gradient descent; beside it the correlation with the first term alone."""
    rows = []
    for seed in seeds:
        found = invariance(steps=steps, seed=seed)
        whole, first = found.correlation(), found.correlation("squares")
        rows.append(
            {"seed": seed, "least": whole.min(), "at_end": whole[-1], "mean": whole.mean(), "first_least": first.min()}
        )
    least = min(row["least"] for row in rows)
    mean = np.mean([row["mean"] for row in rows])
    return Finding(
        measured={"seeds": rows, "least": least, "mean": mean},
        expected="A correlation above 0.99 from the first step to the last, with every seed.",
        verdict="holds" if least > 0.99 else "fails",
        reason=(
            f"The correlation is {mean:.3f} on average and at least {least:.3f} (the theorem assumes a steady gradient "
            "and steady mean frequencies; cross-entropy and softmax keep neither)."
        ),
        model=f"a query over 20 tokens and 20 classes, {steps} steps",
        seeds=list(seeds),
    )


@study(
    "joma_entropy",
    paper=PAPER,
    room="scan",
    claim="With a nonlinearity attention entropy falls, then rises; in the linear case it only falls.",
)
def joma_entropy(seeds: Sequence[int] = range(10), steps: int = 5000) -> Finding:
    """The dynamics of one node after attention has been integrated out, with ten tokens of random salience."""
    rows = []
    for seed in seeds:
        mu = np.sort(3 * np.random.default_rng(seed).random(10) + 1)
        path, entropy = joma_toy(mu, steps=steps)
        _, linear = joma_toy(mu, steps=steps, linear=True)
        reached = np.argmax(path >= 0.5 * mu, axis=0)
        late = ~(path >= 0.5 * mu).any(0)
        order = np.where(late, steps + 1, reached)
        rows.append(
            {
                "seed": seed,
                "start": entropy[0],
                "lowest": entropy.min(),
                "lowest_step": int(entropy.argmin()),
                "end": entropy[-1],
                "in_order": bool((np.diff(order) <= 0).all()),
                "linear_rise": linear[-1] - linear.min(),
            }
        )
    holds = all(
        0 < row["lowest_step"] < steps
        and row["end"] > row["lowest"] + 0.05
        and row["linear_rise"] < 1e-6
        and row["in_order"]
        for row in rows
    )
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("start", "lowest", "end")}
    return Finding(
        measured={"seeds": rows, **means},
        expected=(
            "With every seed a lowest entropy strictly inside the run and 0.05 nats below its end; the more salient a "
            "token the sooner it is half learnt; no rise in the linear case."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Entropy goes from {means['start']:.2f} down to {means['lowest']:.2f} and back to {means['end']:.2f} nats "
            f"on average; in the linear case it rises by at most {max(row['linear_rise'] for row in rows):.0e}."
        ),
        model="JoMA's dynamics of one node, ten tokens",
        seeds=list(seeds),
    )


def joma_toy(
    mu: Float[np.ndarray, " token"],
    temperature: float = 3.0,
    eta: float = 0.02,
    steps: int = 5000,
    start: float = 0.05,
    linear: bool = False,
) -> tuple[Float[np.ndarray, "step token"], Float[np.ndarray, " step"]]:
    """`v += eta (mu - v) * a` with `a = softmax(v^2 / T)` (linear: `v += eta mu * a`): v before every step and after
    the last, and the entropy of a in nats."""
    if min(steps, temperature, eta) <= 0:
        raise HeadwiseError(f"joma_toy wants positive steps, temperature, eta; got {steps}, {temperature}, {eta}.")
    v = np.full(len(mu), start)
    path, entropy = [], []
    for _ in range(steps + 1):
        a = np.exp((v**2 - (v**2).max()) / temperature)
        a /= a.sum()
        path.append(v.copy())
        entropy.append(-(a * np.log(np.maximum(a, 1e-300))).sum())
        v += eta * ((1 if linear else mu - v) * (mu if linear else 1)) * a
    return np.array(path), np.array(entropy)


def frequencies(distinct: int = 10, common: int = 10, classes: int = 20) -> Float[Tensor, "token class_"]:
    """Token frequencies of each class, sums 1: distinct tokens follow a bell over the classes, common ones are even."""
    token, number = torch.arange(distinct)[:, None], torch.arange(classes)[None, :]
    bell = torch.exp(-((token - distinct * number / classes) ** 2) / 30)
    x = torch.cat([bell, torch.full((common, classes), 0.5)]).double()
    return x / x.sum(0)


def invariance(
    steps: int = 2000, lr: float = 0.1, temperature: float = 0.5, width: int = 30, seed: int = 0, normalise: bool = True
) -> Invariance:
    """Trains z and W by gradient descent on cross-entropy, from near 0. Without `normalise` attention is
    `x exp(z / T)` as it is, for which `z - z(0) = (sum_k v_k^2 - sum_k v_k(0)^2) / 2T` is exact as lr goes to 0."""
    x = frequencies()
    tokens, classes = x.shape
    generator = torch.Generator().manual_seed(seed)
    w, z = (0.01 * torch.randn(s, generator=generator, dtype=torch.double) for s in ((width, classes), (tokens,)))
    query = F.one_hot(torch.tensor(tokens), width).double()
    embed = torch.eye(width, tokens, dtype=torch.double)
    w.requires_grad_()
    z.requires_grad_()
    found = []
    for step in range(steps + 1):
        with torch.no_grad():
            squares = (embed.T @ w).square().sum(1) / (2 * temperature)
            whole = squares - squares.sum() * x.mean(1) if normalise else squares
            found.append(torch.stack([z, whole, squares]))
        if step == steps:
            break
        b = x * torch.exp(z / temperature)[:, None]
        out = (embed @ (b / b.sum(0) if normalise else b) + query[:, None]).T @ w
        loss = F.cross_entropy(out, torch.arange(classes))
        with torch.no_grad():
            for part, gradient in zip((w, z), torch.autograd.grad(loss, (w, z)), strict=True):
                part -= lr * gradient
    path = torch.stack(found)
    return Invariance(*(path - path[0]).transpose(0, 1).numpy())
