"""Simultaneous orthogonal matching pursuit: few atoms of a dictionary that explain many vectors at once.

With residual R_0 = H, each step takes the atom of the largest `sum_i |<r_i, d>|`, and R becomes what the least-squares
fit of H on all atoms taken leaves. Explained variance after k steps: `1 - |R_k|^2 / |H|^2`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.errors import HeadwiseError

SPENT = 1e-6
"""An atom whose part outside of those taken is shorter than this (of a unit) adds nothing."""


@dataclass(frozen=True)
class Pursuit:
    """Atoms in the order taken, the fit's coefficients, and the variance explained after each."""

    atoms: Int[Tensor, " step"]
    coefficients: Float[Tensor, "sample step"]
    explained: Float[Tensor, " step"]


def somp(
    h: Float[Tensor, "sample dim"],
    dictionary: Float[Tensor, "atom dim"],
    steps: int,
    unit_atoms: bool = True,
    center: bool = True,
) -> Pursuit:
    """Up to `steps` atoms (fewer when the vectors are explained, or the dictionary spans no more). `unit_atoms` judges
    atoms by their direction only; `center` takes the samples' mean off first, so that a head that always writes the
    same is not called special (the released code's way)."""
    if steps < 1 or h.ndim != 2 or dictionary.ndim != 2 or h.shape[1] != dictionary.shape[1]:
        raise HeadwiseError(
            f"somp wants steps= of at least 1, h [sample, dim] and dictionary [atom, dim]; got {steps}, "
            f"{tuple(h.shape)} and {tuple(dictionary.shape)}."
        )
    h = h - h.mean(0) if center else h
    whole = float((h**2).sum())
    unit = torch.nn.functional.normalize(dictionary, dim=-1)
    judged = unit if unit_atoms else dictionary
    taken: list[int] = []
    explained: list[float] = []
    basis = h.new_zeros(0, h.shape[1])
    residual = h
    free = torch.ones(len(dictionary), dtype=torch.bool, device=h.device)
    while len(taken) < min(steps, len(dictionary)) and bool(free.any()) and float((residual**2).sum()) > 1e-12 * whole:
        gain = (residual @ judged.T).abs().sum(0).masked_fill(~free, -1.0)
        best = int(gain.argmax())
        free[best] = False
        new = unit[best]
        for _ in range(2):  # twice, as rounding leaves some of the others in it
            new = new - basis.T @ (basis @ new)
        if float(new.norm()) < SPENT:
            continue
        basis = torch.cat([basis, new[None] / new.norm()])
        residual = residual - (residual @ basis[-1])[:, None] * basis[-1]
        taken.append(best)
        explained.append(1 - float((residual**2).sum()) / whole)
    atoms = torch.tensor(taken, dtype=torch.long, device=h.device)
    fit = torch.linalg.lstsq(dictionary[atoms].T.double(), h.T.double()).solution.T.to(h) if taken else h[:, :0]
    return Pursuit(atoms, fit, torch.tensor(explained, dtype=torch.float64))
