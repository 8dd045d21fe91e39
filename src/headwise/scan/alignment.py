"""How well do features line up with another system: another model, or any measured signal? (Xu et al., 2025, review the
instruments; brain data is one signal among others.)

X is [stimulus, p], Z [stimulus, q], the same stimuli in the same order.

- "ridge": an encoding model. Z is predicted from X by ridge regression, over contiguous folds (a shuffled time series
  would leak); the penalty per target is chosen among 10^-1 ... 10^4 by contiguous folds inside; the score is the mean
  over targets of Pearson's r on held-out stimuli.
- "rsa": Spearman's correlation of the two dissimilarity matrices (1 - Pearson, or Euclidean), above the diagonal.
- "cka": linear CKA from the unbiased HSIC; about 0 for unrelated features at any size.
- "mknn": the share of the k nearest neighbours (cosine) of a stimulus in X that are so in Z too; k / (n - 1) by chance.
- "procrustes": the nuclear norm of X^T Z, both centred and scaled to norm 1; 1 where a rotation makes them equal.

But for ridge, all columns are standardised first, as one massive channel would decide alone (`standardise=False`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.paper import Paper
from headwise.scan.similarity import paired
from headwise.scan.similarity import similarity as alike

PAPER = Paper(
    "Brain-Language Model Alignment: Insights into the Platonic Hypothesis and Intermediate-Layer Advantage",
    "2510.17833",
)
PENALTIES = tuple(10.0**n for n in range(-1, 5))
Features = Float[Tensor, "stimulus column"]


@dataclass(frozen=True)
class Alignment:
    """`value` is the score; the rest only where the method has it. `per_target` are the held-out correlations of ridge
    (divided by the ceiling, where one was given), `unique` the variance explained beyond the nuisance features, `p` the
    share of permutations that score as high."""

    value: float
    per_target: Float[np.ndarray, " column"] | None = None
    unique: float | None = None
    p: float | None = None


def align(
    x: Features | np.ndarray,
    z: Features | np.ndarray,
    method: str = "cka",
    *,
    nuisance: Features | np.ndarray | None = None,
    standardise: bool = True,
    k: int = 10,
    distance: str = "correlation",
    folds: int = 5,
    groups: Sequence[Any] | None = None,
    ceiling: float | Float[np.ndarray, " column"] | None = None,
    permutations: int = 0,
    seed: int = 0,
) -> Alignment:
    """The alignment of x with z by one of the methods above.

    `nuisance` [stimulus, feature] (length, position, ...) is taken out of both by linear regression; for ridge it also
    gives `unique`, R2 of x and nuisance less R2 of nuisance. `k` is for mknn, `distance` ("correlation", "euclidean")
    for rsa, `folds`, `groups` (stimuli of a group, such as a story, stay together) and `ceiling` (the highest r there
    can be, per target) for ridge. `permutations` shuffles the stimuli of z; for ridge it shifts them in a circle, which
    keeps what neighbours share.

    Raises HeadwiseError where x and z have different numbers of stimuli, or too few.
    """
    if method not in METHODS:
        raise HeadwiseError(f"method: wanted one of {', '.join(METHODS)}; got {method!r}.")
    x, z = paired(x, z)
    extra = None if nuisance is None else paired(x, torch.as_tensor(nuisance).reshape(len(x), -1))[1]
    if method == "ridge":
        split = fold_of(len(x), folds, groups)
        return _with_p(lambda y: encode(x, y, split, extra, ceiling), z, permutations, seed, circular=True)
    if standardise:
        x, z = scaled(x), scaled(z)
    if extra is not None:
        x, z = residual(x, extra), residual(z, extra)
    score = {
        "cka": lambda y: alike(x, y, "lincka_debiased"),
        "rsa": lambda y: rsa(x, y, distance),
        "mknn": lambda y: mutual_neighbours(x, y, k),
        "procrustes": lambda y: procrustes(x, y),
    }[method]
    return _with_p(lambda y: Alignment(score(y)), z, permutations, seed)


METHODS = ("ridge", "rsa", "cka", "mknn", "procrustes")


def rsa(x: Features, z: Features, distance: str = "correlation") -> float:
    """Spearman's correlation of the dissimilarities of all pairs of stimuli."""
    stats = need("scipy.stats", "analysis")
    if distance not in ("correlation", "euclidean"):
        raise HeadwiseError(f'distance: wanted "correlation" or "euclidean"; got {distance!r}.')
    upper = np.triu_indices(len(x), 1)
    pairs = [(1 - torch.corrcoef(y) if distance == "correlation" else torch.cdist(y, y)).numpy()[upper] for y in (x, z)]
    return float(stats.spearmanr(*pairs).statistic)


def mutual_neighbours(x: Features, z: Features, k: int = 10) -> float:
    """Mean share of a stimulus's k nearest neighbours that x and z agree on (Huh et al., 2024)."""
    if not 1 <= k < len(x):
        raise HeadwiseError(f"k: wanted 1 to {len(x) - 1} neighbours among {len(x)} stimuli; got {k!r}.")
    near = []
    for y in (x, z):
        y = y / y.norm(dim=1, keepdim=True).clamp(min=1e-12)
        inner = (y @ y.T).fill_diagonal_(-torch.inf)
        near.append(torch.zeros_like(inner).scatter_(1, inner.topk(k, 1).indices, 1.0))
    return float((near[0] * near[1]).sum(1).mean() / k)


def procrustes(x: Features, z: Features) -> float:
    """`|X^T Z|_*` of centred features of norm 1: 1 - half the squared distance that the best rotation leaves."""
    x, z = (y - y.mean(0) for y in (x, z))
    return float(torch.linalg.svdvals((x / x.norm()).T @ (z / z.norm())).sum())


def encode(
    x: Features, z: Features, split: Float[np.ndarray, " stimulus"], nuisance: Features | None, ceiling: Any
) -> Alignment:
    """Held-out correlations of every target with its prediction, and what x explains beyond the nuisance features."""
    r = correlation(z, held_out(x, z, split))
    if ceiling is not None:
        limit = np.broadcast_to(np.asarray(ceiling, float), r.shape)
        if not ((limit > 0) & (limit <= 1)).all():
            raise HeadwiseError(f"ceiling: wanted correlations above 0, at most 1, one a target; got {ceiling!r}.")
        r = r / limit
    unique = None
    if nuisance is not None:
        both = explained(z, held_out(torch.cat([x, nuisance], 1), z, split))
        unique = float((both - explained(z, held_out(nuisance, z, split))).mean())
    return Alignment(float(np.nanmean(r)), r, unique)


def held_out(x: Features, z: Features, split: np.ndarray) -> Features:
    """Predictions of z for every fold from the others; the penalty of each target is chosen inside."""
    predicted = torch.zeros_like(z)
    for fold in np.unique(split):
        train, test = torch.from_numpy(split != fold), torch.from_numpy(split == fold)
        inner = fold_of(int(train.sum()), min(5, int(train.sum()) // 2), None)
        error = torch.zeros(len(PENALTIES), z.shape[1], dtype=z.dtype)
        for part in np.unique(inner):
            a, b = torch.from_numpy(inner != part), torch.from_numpy(inner == part)
            guesses = ridge(x[train][a], z[train][a], x[train][b])
            error += (guesses - z[train][b]).square().sum(1)
        guesses = ridge(x[train], z[train], x[test])
        best = error.argmin(0)
        predicted[test] = guesses[best, :, torch.arange(z.shape[1])].T
    return predicted


def ridge(x: Features, z: Features, at: Features) -> Float[Tensor, "penalty stimulus column"]:
    """Predictions `at` from ridge regressions of z on x, for all penalties; both are standardised by the rows of x."""
    mean, spread, middle = x.mean(0), x.std(0).clamp(min=1e-12), z.mean(0)
    u, s, v = torch.linalg.svd((x - mean) / spread, full_matrices=False)
    there = s > 1e-10 * s[:1]
    u, s, v = u[:, there], s[there], v[there]
    seen = ((at - mean) / spread) @ v.T
    shrunk = torch.stack([s / (s**2 + penalty) for penalty in PENALTIES])
    return torch.einsum("ar,pr,rc->pac", seen, shrunk, u.T @ (z - middle)) + middle


def fold_of(count: int, folds: int, groups: Sequence[Any] | None) -> np.ndarray:
    """The fold of every stimulus: contiguous blocks of stimuli, or of groups in the order they come in."""
    names = list(range(count)) if groups is None else list(groups)
    if len(names) != count:
        raise HeadwiseError(f"groups: wanted one for each of the {count} stimuli; got {len(names)}.")
    order = list(dict.fromkeys(names))
    if not 2 <= folds <= len(order):
        raise HeadwiseError(f"folds: wanted 2 to {len(order)}, one group or more in each; got {folds!r}.")
    place = {name: n * folds // len(order) for n, name in enumerate(order)}
    return np.array([place[name] for name in names])


def delayed(x: Features, delays: Sequence[int] = (1, 2, 3, 4)) -> Features:
    """Finite impulse response: the features of 1, 2, ... stimuli before, side by side (0 before the start)."""
    if not delays or min(delays) < 0 or max(delays) >= len(x):
        raise HeadwiseError(f"delays: wanted steps of 0 to {len(x) - 1}; got {tuple(delays)!r}.")
    return torch.cat([torch.cat([x.new_zeros(d, x.shape[1]), x[: len(x) - d]]) for d in delays], 1)


def correlation(z: Features, guess: Features) -> np.ndarray:
    """Pearson's r per column; nan where either is constant."""
    a, b = z - z.mean(0), guess - guess.mean(0)
    size = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(size > 0, (a * b).sum(0) / size, torch.nan).numpy()


def explained(z: Features, guess: Features) -> np.ndarray:
    """R2 per column."""
    return (1 - (z - guess).square().sum(0) / (z - z.mean(0)).square().sum(0).clamp(min=1e-12)).numpy()


def scaled(x: Features) -> Features:
    spread = x.std(0)
    return torch.where(spread > 0, (x - x.mean(0)) / spread.clamp(min=1e-12), 0.0)


def residual(x: Features, nuisance: Features) -> Features:
    """What a linear regression on the nuisance features leaves of every column."""
    known = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), nuisance], 1)
    return x - known @ torch.linalg.lstsq(known, x).solution


def _with_p(
    score: Callable[[Features], Alignment], z: Features, permutations: int, seed: int, circular: bool = False
) -> Alignment:
    found = score(z)
    if not permutations:
        return found
    draw = np.random.default_rng(seed)
    steps = draw.integers(1, len(z), permutations)
    moved = (np.roll(np.arange(len(z)), s) if circular else draw.permutation(len(z)) for s in steps)
    as_high = sum(score(z[torch.from_numpy(order)]).value >= found.value for order in moved)
    return Alignment(found.value, found.per_target, found.unique, (1 + as_high) / (1 + permutations))
