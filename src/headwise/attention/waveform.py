"""The waveform of rotary positions: how the score that can be attained at a distance depends on the distance alone.

For frequencies theta_j (base b, head width D: `theta_j = b^(-2j/D)`, j = 0 ... D/2 - 1) the attainable score at a
distance of s tokens is bounded by `W(s) = (2/D) sum_i |sum_{j<i} exp(i s theta_j)|` (i = 1 ... D/2): it falls with the
distance, in ripples whose peaks and troughs depend on the base.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from headwise.errors import HeadwiseError

Frequencies = Float[np.ndarray, " pair"]


def rope_frequencies(base: float, head_dim: int) -> Frequencies:
    """`base^(-2j/head_dim)` for the pairs j of a head, in radians a token."""
    if not base > 1 or head_dim < 2 or head_dim % 2:
        raise HeadwiseError(f"Wanted a base above 1 and an even head_dim; got base={base!r}, head_dim={head_dim!r}.")
    return float(base) ** (-np.arange(0, head_dim, 2) / head_dim)


def rope_waveform(frequencies: Frequencies, max_distance: int = 4096) -> Float[np.ndarray, " distance"]:
    """W(s) for s = 0 ... max_distance; `W(0) = (D/2 + 1) / 2` is the largest."""
    angle = np.arange(max_distance + 1)[:, None] * np.asarray(frequencies, dtype=float)
    return np.abs(np.exp(1j * angle).cumsum(1)).mean(1)


def rope_peaks(waveform: Float[np.ndarray, " distance"]) -> tuple[Int[np.ndarray, " peak"], Int[np.ndarray, " trough"]]:
    """The distances of the local maxima and of the local minima, ends left out."""
    step = np.sign(np.diff(waveform))
    return np.flatnonzero((step[:-1] > 0) & (step[1:] <= 0)) + 1, np.flatnonzero((step[:-1] < 0) & (step[1:] >= 0)) + 1


def ripples(curve: Float[np.ndarray, "... distance"], degree: int = 3) -> Float[np.ndarray, "... distance"]:
    """A positive curve over distances 1, 2, ... divided by its trend: a polynomial in log(distance) through its
    logarithm. How the trend is taken out is not settled by the paper."""
    x = np.log(np.arange(1, curve.shape[-1] + 1))
    basis = np.polynomial.chebyshev.chebvander(2 * x / x[-1] - 1, degree)
    level = np.log(np.maximum(curve, 1e-30))
    trend = level @ basis @ np.linalg.pinv(basis.T @ basis) @ basis.T
    return np.exp(level - trend)
