"""Attention as sparse distributed memory: which Hamming radius does a softmax stand for?

A binary memory of n bits writes a pattern to all places within Hamming radius d and reads from all within d of the
query; a pattern at distance v is read with weight `I(v)`, the number of places in both balls. `I` falls almost
exponentially, so that over unit vectors with `cos = 1 - 2 v / n` reading is almost `softmax(beta cos)`: a small radius
is a large (sharp) beta. All counts are logarithms, as they overflow.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from jaxtyping import Float

from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.paper import Paper

PAPER = Paper("Attention Approximates Sparse Distributed Memory", "2111.05498")
SPECIAL_64 = {"signal_to_noise": 11, "capacity": 5, "critical_distance": 15}
"""Radii for 64 bits that are best for the signal-to-noise ratio, for capacity, and for the critical distance (after the
paper; its derivations of them are not repeated here)."""


def _log_choose(n: int, k: np.ndarray | int) -> np.ndarray:
    """`log C(n, k)`, -inf outside of 0..n."""
    table = np.array([math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) for j in range(n + 1)])
    k = np.asarray(k)
    return np.where((k >= 0) & (k <= n), table[np.clip(k, 0, n)], -np.inf)


@cache
def _log_intersection(n: int, d: int) -> tuple[float, ...]:
    found = []
    for v in range(n + 1):
        i, j = np.meshgrid(np.arange(n - v + 1), np.arange(v + 1), indexing="ij")  # flips of agreeing, differing bits
        both = (i + j <= d) & (i + v - j <= d)
        logs = (_log_choose(n - v, i) + _log_choose(v, j))[both]
        found.append(float(np.logaddexp.reduce(logs)) if logs.size else -math.inf)
    return tuple(found)


def log_intersection(n: int, d: int) -> Float[np.ndarray, " distance"]:
    """`log I(v)` for v = 0..n: `I(v) = sum C(n-v, i) C(v, j)` over i, j with `i + j <= d` and `i + v - j <= d`; -inf
    where the balls don't meet (v > 2 d)."""
    if n < 2 or not 0 <= d <= n:
        raise HeadwiseError(f"log_intersection wants n of at least 2 and 0 <= d <= n; got n={n!r}, d={d!r}.")
    return np.array(_log_intersection(n, d))


def log_cap_intersection(n: int, d: int, cos: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """The same on the sphere, up to a constant: the log of the area two caps share whose centres have this cosine. A
    cap reaches as far as radius d, `cos theta_d = 1 - 2 d / n`; with half the angle between the centres, t, the area is
    `integral from t to theta_d of sin^(n-2)(phi) I(1 - (tan t / tan phi)^2; (n-2)/2, 1/2) dphi`, I the regularised
    incomplete beta function. For radii below n/2."""
    if not 0 < d < n / 2:
        raise HeadwiseError(f"log_cap_intersection(d=...) wants a radius above 0 and below n/2 = {n / 2:g}; got {d!r}.")
    edge = math.acos(1 - 2 * d / n)
    half = np.arccos(np.clip(cos, -1, 1))[..., None] / 2
    phi = half + (edge - half) * (np.arange(400) + 0.5) / 400  # midpoints
    shared = need("scipy.special", "analysis").betainc(
        (n - 2) / 2, 0.5, np.clip(1 - (np.tan(half) / np.tan(phi)) ** 2, 0, 1)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.logaddexp.reduce((n - 2) * np.log(np.sin(phi)) + np.log(shared), axis=-1) + np.log(
            edge - half[..., 0]
        )
    return np.where(half[..., 0] < edge, logs, -np.inf)


def fit_beta(n: int, d: int, reference_beta: bool = False) -> tuple[float, float, float]:
    """Beta, bias and r2 of the least-squares line of `log I(v)` on `cos = 1 - 2 v / n`, over v = 0..d-1.

    `reference_beta` divides as the paper's code does (a sample covariance by a population variance), which makes beta
    larger by d/(d-1)."""
    if d < 2:
        raise HeadwiseError(f"fit_beta(d=...) wants a radius of at least 2, for a line; got {d!r}.")
    logs = log_intersection(n, d)[:d]
    cos = 1 - 2 * np.arange(d) / n
    x, y = cos - cos.mean(), logs - logs.mean()
    beta = float(x @ y / (x @ x))
    r2 = float((x @ y) ** 2 / ((x @ x) * (y @ y)))
    beta *= d / (d - 1) if reference_beta else 1
    return beta, float(logs.mean() - beta * cos.mean()), r2


@cache
def beta_table(n: int) -> tuple[float, ...]:
    """Beta of the radii 2..n//2, made to fall: small radii of few points may fit out of order (3 and 4 of 64 bits)."""
    return tuple(np.minimum.accumulate([fit_beta(n, d)[0] for d in range(2, n // 2 + 1)]).tolist())


def radius_of_beta(n: int, beta: Float[np.ndarray, "*any"] | float) -> Float[np.ndarray, "*any"]:
    """The radius whose beta is this one, between whole radii by interpolation of log beta. Betas above that of radius 2
    give 2, below that of n/2 give n/2; nan stays nan."""
    table = np.array(beta_table(n))
    radii = np.arange(2, n // 2 + 1, dtype=float)
    beta = np.asarray(beta, dtype=float)
    logs = np.log(np.clip(beta, table[-1], table[0]))
    return np.interp(-logs, -np.log(table), radii)


def scaled_radius(d: int, n: int, wanted: int) -> int:
    """The radius among `wanted` bits whose ball holds the same share of all places as radius d among n bits."""
    share = np.exp(np.logaddexp.reduce(_log_choose(n, np.arange(d + 1))) - n * math.log(2))
    cumulative = np.exp(np.logaddexp.accumulate(_log_choose(wanted, np.arange(wanted + 1))) - wanted * math.log(2))
    return int(np.searchsorted(cumulative, share * (1 - 1e-9)))


def special_betas(n: int) -> dict[str, float]:
    """Beta of each special radius, carried over from 64 to n bits."""
    return {name: fit_beta(n, max(2, scaled_radius(d, 64, n)))[0] for name, d in SPECIAL_64.items()}
