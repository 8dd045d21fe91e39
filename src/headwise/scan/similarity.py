"""How alike are two sets of features of the same things? Neuron by neuron, and as whole spaces (Kheir et al., 2024).

X is [row, p] and Y [row, q], with the same rows (tokens, words, frames, inputs) in the same order. All are 1 for X = Y.

- maxcorr: mean over columns i of X of the largest absolute correlation with a column of Y. Unchanged by permutation and
  scale of columns only.
- linreg: mean over columns i of X of the multiple correlation with all of Y, `|U^T x_i| / |x_i|`, U an orthonormal
  basis of Y. Unchanged by any invertible map of Y.
- svcca: mean canonical correlation of the directions of X and Y (columns standardised) that hold `var` of the variance.
- pwcca: the same, each canonical direction weighted by how much of the raw X it holds.
- lincka: `|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)`, columns centred. Unchanged by rotation and scale.
- lincka_debiased: the same from the unbiased estimate of HSIC, for rows not many more than columns.
- rbfcka: lincka with Gaussian kernels, their bandwidth `bandwidth` times the median distance.

maxcorr, linreg and pwcca are of X in Y, the others symmetric. `mincorr` is about a set of models: a neuron's lowest
maxcorr over the others. Constant columns are left out of means. With few rows or many columns all but the debiased form
are biased upward: `baseline` gives the value for shuffled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from headwise.errors import HeadwiseError

Features = Float[Tensor, "row column"]


@dataclass(frozen=True)
class Measure:
    """`prepare` does once per set of features what `compare` needs of it: a grid of layers reuses it."""

    prepare: Callable[[Features, float, float], tuple[Tensor, ...]]
    compare: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], float]


def similarity(
    x: Features | np.ndarray,
    y: Features | np.ndarray,
    method: str = "lincka",
    var: float = 0.99,
    bandwidth: float = 1.0,
) -> float:
    """One number for two sets of features: see the table above. `var` is the share of variance SVCCA and PWCCA keep.

    >>> similarity(x, x @ rotation, "lincka"), similarity(x, x @ rotation, "maxcorr")
    """
    measure, (x, y) = measure_of(method, var, bandwidth), paired(x, y)
    return measure.compare(measure.prepare(x, var, bandwidth), measure.prepare(y, var, bandwidth))


def grid(
    a: Sequence[Features], b: Sequence[Features], method: str, var: float = 0.99, bandwidth: float = 1.0
) -> xr.DataArray:
    """`similarity` of every set in `a` to every set in `b`: dims layer_a, layer_b."""
    measure = measure_of(method, var, bandwidth)
    paired(a[0], b[0])
    left = [measure.prepare(as_features(x, "a"), var, bandwidth) for x in a]
    right = left if a is b else [measure.prepare(as_features(y, "b"), var, bandwidth) for y in b]
    values = [[measure.compare(x, y) for y in right] for x in left]
    return xr.DataArray(
        values,
        dims=("layer_a", "layer_b"),
        coords={"layer_a": range(len(left)), "layer_b": range(len(right))},
        name="similarity",
        attrs={"method": method},
    )


def baseline(x: Features, y: Features, method: str, draws: int = 5, seed: int = 0, var: float = 0.99) -> float:
    """The mean similarity after the rows of y were shuffled: what the sizes alone give."""
    generator = torch.Generator().manual_seed(seed)
    x, y = paired(x, y)
    return float(
        np.mean([similarity(x, y[torch.randperm(len(y), generator=generator)], method, var) for _ in range(draws)])
    )


def maxcorr(x: Features, y: Features) -> Float[Tensor, " column"]:
    """For every column of x, its highest absolute correlation with a column of y; nan where it is constant."""
    x, y = paired(x, y)
    return _maxcorr(_standard(x), _standard(y))


def mincorr(x: Features, others: Sequence[Features]) -> Float[Tensor, " column"]:
    """For every column of x, the lowest `maxcorr` over several other models: high where all of them have such a
    neuron."""
    if not len(others):
        raise HeadwiseError("others: wanted the features of at least one other model; got none.")
    return torch.stack([maxcorr(x, y) for y in others]).amin(0)


def as_features(x: Tensor | np.ndarray, name: str) -> Features:
    x = torch.as_tensor(x)
    if x.ndim != 2 or len(x) < 4:
        raise HeadwiseError(f"{name}: wanted features [row, column] with at least 4 rows; got shape {tuple(x.shape)}.")
    if not torch.isfinite(x).all():
        raise HeadwiseError(f"{name}: the features are not all finite.")
    return x.detach().cpu().double()


def paired(x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> tuple[Features, Features]:
    x, y = as_features(x, "x"), as_features(y, "y")
    if len(x) != len(y):
        raise HeadwiseError(f"x, y: wanted the same rows in both; got {len(x)} and {len(y)}.")
    return x, y


def measure_of(method: str, var: float, bandwidth: float) -> Measure:
    if method not in MEASURES:
        raise HeadwiseError(f"method: wanted one of {', '.join(MEASURES)}; got {method!r}.")
    if not 0 < var <= 1:
        raise HeadwiseError(f"var: wanted a share of variance between 0 and 1; got {var!r}.")
    if not bandwidth > 0:
        raise HeadwiseError(f"bandwidth: wanted more than 0 times the median distance; got {bandwidth!r}.")
    return MEASURES[method]


def _standard(x: Features) -> Features:
    """Columns of mean 0 and norm 1; constant ones become 0."""
    size = x.norm(dim=0)
    x = x - x.mean(0)
    norm = x.norm(dim=0)
    return torch.where(norm > 1e-9 * size, x / norm, 0.0)


def _maxcorr(x: Features, y: Features) -> Float[Tensor, " column"]:
    best = (x.T @ y).abs().amax(1)
    return torch.where(x.any(0), best, torch.nan)


def _basis(x: Features) -> tuple[Tensor, Tensor]:
    """Left singular vectors [row, k] of the directions that are there, and their singular values."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    there = s > 1e-10 * s[:1]
    return u[:, there], s[there]


def _leading(x: Features, var: float) -> Tensor:
    """Directions with a cumulative share of variance below `var` (the one that crosses it is left out), at least 1."""
    u, s = _basis(x)
    share = (s**2).cumsum(0) / (s**2).sum()
    count = len(s) if var == 1 else int((share < var).sum())
    return u[:, : max(1, count)]


def _linreg(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
    fitted = (y[0].T @ x[1]).norm(dim=0)
    return float(fitted[x[1].any(0)].mean())


def _svcca(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
    return float(torch.linalg.svdvals(x[0].T @ y[0]).clamp(max=1).mean())


def _pwcca(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
    u, rho, _ = torch.linalg.svd(x[0].T @ y[0], full_matrices=False)
    weight = ((x[0] @ u).T @ x[1]).abs().sum(1)
    return float((weight * rho.clamp(max=1)).sum() / weight.sum())


def _linear(x: Features) -> tuple[Tensor, ...]:
    """Centred features whose kernel has norm 1: kernels are never made, products of features say all."""
    x = x - x.mean(0)
    return (x / (x.T @ x).norm().sqrt(),)


def _lincka(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
    return float((x[0].T @ y[0]).square().sum())


def _debiased(x: Features) -> tuple[Tensor, ...]:
    """Centred features, and of their kernel without its diagonal: the row sums; the diagonal."""
    x = x - x.mean(0)
    diagonal = x.square().sum(1)
    parts = (x, x @ x.sum(0) - diagonal, diagonal)
    return (*parts, torch.tensor(_hsic(parts, parts), dtype=x.dtype))


def _hsic(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
    """`n (n - 3)` times the unbiased estimate of HSIC (Song et al., 2012, equation 5)."""
    n = len(x[0])
    trace = (x[0].T @ y[0]).square().sum() - x[2] @ y[2]
    middle = x[1].sum() * y[1].sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (x[1] @ y[1])
    return float(trace + middle)


def _lincka_debiased(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
    return float(_hsic(x, y) / (x[3] * y[3]).sqrt())


def _centred(kernel: Float[Tensor, "row row"]) -> tuple[Tensor, ...]:
    kernel = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    return (kernel / kernel.norm(),)


def _gaussian(x: Features, bandwidth: float) -> Float[Tensor, "row row"]:
    distance = torch.cdist(x, x)
    apart = distance[~torch.eye(len(x), dtype=torch.bool)]
    return (-(distance**2) / (2 * (bandwidth * apart.median()) ** 2)).exp()


def _inner(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
    return float((x[0] * y[0]).sum())


MEASURES: dict[str, Measure] = {
    "maxcorr": Measure(lambda x, var, _: (_standard(x),), lambda x, y: float(_maxcorr(x[0], y[0]).nanmean())),
    "linreg": Measure(lambda x, var, _: (_basis(_standard(x))[0], _standard(x)), _linreg),
    "svcca": Measure(lambda x, var, _: (_leading(_standard(x), var),), _svcca),
    "pwcca": Measure(lambda x, var, _: (_leading(_standard(x), var), x), _pwcca),
    "lincka": Measure(lambda x, var, _: _linear(x), _lincka),
    "lincka_debiased": Measure(lambda x, var, _: _debiased(x), _lincka_debiased),
    "rbfcka": Measure(lambda x, var, bandwidth: _centred(_gaussian(x, bandwidth)), _inner),
}
