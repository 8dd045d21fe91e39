"""Does a matrix hold more than noise? Its singular values against the Marchenko-Pastur law.

For a matrix [m, n] of independent entries with variance v, m <= n, the eigenvalues of `X X^T / n` end at
`v (1 + sqrt(m / n))^2` as it grows; what lies beyond is structure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import HeadwiseError


class Outliers(NamedTuple):
    count: int
    """Eigenvalues beyond the edge."""
    edge: float
    largest: float
    """The largest eigenvalue over the edge."""
    gap: float
    """The largest over the second largest."""
    participation: float
    """`(sum l)^2 / sum l^2`: how many eigenvalues share the variance."""


def mp_outliers(matrix: Float[Tensor, "m n"], margin: float = 3.0) -> Outliers:
    """The eigenvalues of the centred matrix beyond the Marchenko-Pastur edge of noise of its shape and variance.

    The largest eigenvalue of finite noise varies around the edge by the Tracy-Widom scale `v (sqrt(n) + sqrt(m))
    (1 / sqrt(m) + 1 / sqrt(n))^(1/3) / n`; `margin` of these are allowed (3: about one noise matrix in 5,000 exceeds).
    """
    if matrix.ndim != 2 or min(matrix.shape) < 2:
        raise HeadwiseError(f"matrix: wanted [m, n] with at least 2 rows and columns; got {tuple(matrix.shape)}.")
    x = matrix.detach().double()
    x = x - x.mean()
    m, n = sorted(x.shape)
    variance = float(x.var())
    if variance == 0:
        raise HeadwiseError("matrix: all its entries are the same, so that there is nothing to compare with noise.")
    values = torch.linalg.svdvals(x) ** 2 / n
    scale = variance * (n**0.5 + m**0.5) * (m**-0.5 + n**-0.5) ** (1 / 3) / n
    edge = variance * (1 + (m / n) ** 0.5) ** 2 + margin * scale
    total, squares = float(values.sum()), float((values**2).sum())
    first, second = (float(v) for v in values[:2])
    return Outliers(int((values > edge).sum()), edge, first / edge, first / max(second, 1e-300), total**2 / squares)
