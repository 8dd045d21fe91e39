"""Is reading a sparse distributed memory the same as a softmax, and are trained heads in its useful range?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened, open_model
from headwise.scan.sdm import PAPER, fit_beta, log_cap_intersection, log_intersection, special_betas
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.score_rank import one_input

BITS = 64
MODES = ("binary", "continuous", "softmax", "hopfield")
Bits = Float[np.ndarray, "pattern bit"]


@dataclass(frozen=True)
class SDMMemory:
    """Patterns of 0 and 1, read by their distance from a query, each counting as pointer to itself.

    "binary": weight I(v), the places two Hamming balls of radius `d` share, with a threshold at one half after each
    step; a query that meets no pattern's ball stays as it is. "continuous": the area two caps of the sphere share
    instead. "softmax": weight `exp(beta cos)` with the beta fitted to I.
    "hopfield": the classic rule, `sign(sum_p p (p . x))` over +1 and -1."""

    patterns: Bits
    d: int
    mode: Literal["binary", "continuous", "softmax", "hopfield"] = "binary"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise HeadwiseError(f"mode: wanted one of {', '.join(MODES)}; got {self.mode!r}.")

    def weights(self, queries: Bits) -> Float[np.ndarray, "query pattern"]:
        """How much of each pattern is read, the sum 1 (0 where nothing is)."""
        n = self.patterns.shape[1]
        distance = np.abs(queries[:, None] - self.patterns[None]).sum(-1).round().astype(int)
        if self.mode == "softmax":
            logs = fit_beta(n, self.d)[0] * (1 - 2 * distance / n)
        elif self.mode == "continuous":
            logs = log_cap_intersection(n, self.d, 1 - 2 * np.arange(n + 1) / n)[distance]
        else:
            logs = log_intersection(n, self.d)[distance]
        peak = logs.max(-1, keepdims=True)
        raw = np.exp(logs - np.where(np.isfinite(peak), peak, 0))
        return raw / np.maximum(raw.sum(-1, keepdims=True), 1e-300)

    def read(self, queries: Bits, steps: int = 10) -> Bits:
        """The patterns that reading again and again arrives at."""
        for _ in range(steps):
            if self.mode == "hopfield":
                signs = 2 * self.patterns - 1
                new = ((2 * queries - 1) @ signs.T @ signs >= 0).astype(float)
            else:
                weights = self.weights(queries)
                new = np.where(weights.sum(-1, keepdims=True) > 0, weights @ self.patterns >= 0.5, queries).astype(
                    float
                )
            if (new == queries).all():
                break
            queries = new
        return queries


@study(
    "sdm_exponential",
    paper=PAPER,
    room="scan",
    claim="The overlap of two Hamming balls falls exponentially with their distance, so that reading is a softmax.",
)
def sdm_exponential(
    radii: Sequence[int] = (5, 11, 15, 20), patterns: int = 100, seeds: Sequence[int] = (0, 1, 2)
) -> Finding:
    """r2 of the line through `log I(v)`, v = 0..d-1, in 64 bits, and the total variation distance between normalised
    overlaps and the softmax with the fitted beta, for queries 8 flips from one of 100 random patterns. The rule is
    about the radii the paper names (5, 11, 15): r2 above 0.95 and a distance below 0.1 for at least two of them."""
    rows = {}
    for d in radii:
        beta, _, r2 = fit_beta(BITS, d)
        gaps = []
        for seed in seeds:
            draw = np.random.default_rng(seed)
            stored = draw.integers(0, 2, (patterns, BITS)).astype(float)
            queries = flipped(stored, 8, draw)
            a, b = (SDMMemory(stored, d, mode).weights(queries) for mode in ("binary", "softmax"))
            gaps.append(float(np.abs(a - b).sum(-1).mean() / 2))
        rows[str(d)] = {"beta": beta, "r2": r2, "total_variation": float(np.mean(gaps))}
    good = [d for d, row in rows.items() if row["r2"] > 0.95 and row["total_variation"] < 0.1]
    holds = len({"5", "11", "15"} & set(good)) >= 2
    named = "; ".join(f"d={d}: r2 {row['r2']:.3f}, distance {row['total_variation']:.3f}" for d, row in rows.items())
    return Finding(
        measured=rows,
        expected="r2 above 0.95 and a total variation distance below 0.1 for at least two of the radii 5, 11 and 15.",
        verdict="holds" if holds else "fails",
        reason=f"{named}. The line is fitted near the query; far patterns overlap less than it says, the more so the "
        "larger the radius.",
        model=f"{patterns} random patterns of {BITS} bits",
        seeds=seeds,
    )


def flipped(patterns: Bits, flips: int, draw: np.random.Generator) -> Bits:
    """Every pattern with so many random bits turned over."""
    where = np.argsort(draw.random(patterns.shape), axis=1)[:, :flips]
    changed = patterns.copy()
    np.put_along_axis(changed, where, 1 - np.take_along_axis(changed, where, 1), 1)
    return changed


@study(
    "sdm_recall",
    paper=PAPER,
    room="scan",
    claim="A sparse distributed memory and a softmax of the fitted beta recall the same patterns from the same damage.",
)
def sdm_recall(
    stored: int = 100, d: int = 11, flips: Sequence[int] = (0, 4, 8, 12, 16, 20), seeds: Sequence[int] = (0, 1, 2)
) -> Finding:
    """Digits of 8 x 8 (scikit-learn), black or white by each one's mean: the share of stored digits that reading brings
    back exactly from a number of turned bits. Reading on the sphere and the classic Hopfield rule stand beside."""
    images = need("sklearn.datasets", "analysis").load_digits().data
    binary = (images > images.mean(1, keepdims=True)).astype(float)
    share = {mode: np.zeros((len(seeds), len(flips))) for mode in MODES}
    for row, seed in enumerate(seeds):
        draw = np.random.default_rng(seed)
        patterns = np.unique(binary, axis=0)
        patterns = patterns[draw.choice(len(patterns), stored, replace=False)]
        for column, count in enumerate(flips):
            queries = flipped(patterns, count, draw)
            for mode in MODES:
                back = SDMMemory(patterns, d, mode).read(queries)
                share[mode][row, column] = (back == patterns).all(-1).mean()
    gap = float(np.abs(share["binary"] - share["softmax"]).mean())
    holds = gap < 0.1 and float(share["binary"].mean()) > 0.1
    named = "; ".join(f"{mode} " + ", ".join(f"{x:.2f}" for x in share[mode].mean(0)) for mode in MODES)
    return Finding(
        measured={"flips": list(flips), **{mode: share[mode].mean(0) for mode in MODES}, "gap": gap},
        expected="The shares recalled differ by less than 0.1 on average, and something is recalled at all.",
        verdict="holds" if holds else "fails",
        reason=f"Recalled after {', '.join(map(str, flips))} turned bits: {named}; "
        f"mean difference {gap:.3f}: the softmax's tail lets far patterns in.",
        model=f"{stored} digits of {BITS} bits, radius {d}",
        seeds=seeds,
    )


@study(
    "sdm_effective_beta",
    paper=PAPER,
    room="scan",
    claim="Most heads of trained models are as sharp as a sparse distributed memory at its useful radii.",
)
def sdm_effective_beta(models: Sequence[Any] = ("zoo:llm", "zoo:encoder"), tokens: int = 1024) -> Finding:
    """A head's beta is its queries' largest score (the paper's measure, a lower bound), averaged over one text. Useful
    are the betas between those of the radii the paper names, carried over to as many bits as the head dim. Beta by the
    norms of queries and keys is reported beside."""
    rows = {}
    for given in models:
        opened = given if isinstance(given, Opened) else open_model(given)
        batch, length = one_input(opened, tokens)
        table = scan.heads(opened, inputs=[batch], questions=[scan.EffectiveBeta()]).heads
        betas = special_betas(opened.sites[0].head_dim).values()
        low, high = min(betas), max(betas)
        inside = table["effective_beta"].between(low, high)
        rows[opened.name] = {
            "tokens": length,
            "range": [low, high],
            "share_inside": inside.mean(),
            "median_beta": table["effective_beta"].median(),
            "median_by_layer": table.groupby("layer")["effective_beta"].median().tolist(),
            "share_inside_by_norms": table["beta_mean_key"].between(low, high).mean(),
            "median_by_norms": table["beta_mean_key"].median(),
            "median_value_norm_corr": table["value_norm_corr"].median(),
        }
    holds = all(row["share_inside"] > 0.5 for row in rows.values())
    named = "; ".join(
        f"{name}: {row['share_inside']:.0%} of heads between {row['range'][0]:.1f} and {row['range'][1]:.1f} (median "
        f"{row['median_beta']:.1f}; by norms {row['share_inside_by_norms']:.0%}, median {row['median_by_norms']:.1f})"
        for name, row in rows.items()
    )
    return Finding(
        measured=rows,
        expected="In every model more than half of the heads' largest scores lie in the useful range.",
        verdict="holds" if holds else "fails",
        reason=f"{named}.",
        model=", ".join(rows),
    )
