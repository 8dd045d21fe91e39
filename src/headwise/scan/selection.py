"""How much can a head select? Normalised weights shrink as 1/L, and what is selected soon lies among what is not.

For one query with weights alpha over L tokens and value vectors x: contributions `y_i = alpha_i x_i`, S the N tokens of
largest weight, `s = sum_{i in S} y_i` (not divided by its mass), distances `d_j = |y_j - s|`.
- distance: the sum and the mean of d_j over the tokens not in S;
- separable share `N_s / N`: selected tokens inside the largest ball around s that holds no other token,
  `d_i < min_{j not in S} d_j`;
- precision: `N / (N + #{j not in S: d_j <= max_{i in S} d_i})`.
All are nan where N >= L, as there is nothing to select from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention import Inputs, Map, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.scan.needs import quiet
from headwise.scan.question import Column, Prompt, Question

MEASURES = ("distance_mean", "distance_sum", "separable", "precision")


@dataclass(frozen=True)
class SelectionCapacity(Question):
    """`selection_capacity`: N_s / N at `n` tokens. `selection_capacity_rest`: the same with the first token left out,
    which as a sink takes much weight and writes almost nothing. `selection_precision`; `effective_tokens` = exp of the
    entropy; `softmax_jacobian`: spectral norm of `diag(alpha) - alpha alpha^T` (at most 1/2, two tokens of weight 1/2).
    Means over `queries` random queries, those that see at least `row_min` tokens. Profiles `selection_curve_<measure>`
    hold every measure for each N of `top` (dims layer, head, top).

    `vectors`: "value" (v_i) or "value_o" (v_i W_O). A key with weight 0 counts as not seen."""

    n: int = 5
    top: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    queries: int = 16
    row_min: int = 32
    vectors: Literal["value", "value_o"] = "value"
    paper: ClassVar[Paper] = Paper("Limitations of Normalization in Attention Mechanism", "2508.17821")
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.n not in self.top or min(self.top) < 1 or self.queries < 1:
            raise HeadwiseError(
                f"SelectionCapacity wants n= to be one of top=, at least one query, and every N at least 1; got n="
                f"{self.n!r}, top={self.top!r}, queries={self.queries!r}."
            )
        if self.vectors not in ("value", "value_o"):
            raise HeadwiseError(f'SelectionCapacity(vectors=...) must be "value" or "value_o"; got {self.vectors!r}.')

    def columns(self) -> tuple[Column, ...]:
        n, share = self.n, "share of tokens"
        return (
            Column(
                "selection_capacity",
                "Separable selection",
                f"Share of the {n} most attended tokens that lie closer to their sum than any other token does.",
                share,
                "keeps what it selects apart",
            ),
            Column(
                "selection_capacity_rest",
                "Separable selection, first token aside",
                f"The same for the {n} most attended tokens other than the first of the text.",
                share,
                "keeps what it selects apart",
            ),
            Column(
                "selection_precision",
                "Precision of the selection",
                f"Share of the {n} most attended tokens among all that lie as close to their sum as these do.",
                share,
                "lets few others in",
            ),
            Column(
                "effective_tokens",
                "Effective number of tokens",
                "Exponential of the entropy of the attention.",
                "tokens",
                "spreads over many tokens",
            ),
            Column(
                "softmax_jacobian",
                "Sensitivity of the softmax",
                "Largest factor by which a small change of the scores can change the weights (at most 0.5).",
                "per unit of score",
                "small changes of the scores move its weights",
            ),
        )

    def streams(self, opened: Opened) -> Sequence[str]:
        return list(dict.fromkeys(site.stream for site in opened.sites if site.kind == "self"))

    def lacks(self, opened: Opened) -> str | None:
        return None if self.streams(opened) else "self-attention"

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        streams = self.streams(opened)
        readings = [f for s in streams for f in (
            Map(queries=self.queries, stream=s, name=f"map_{s}"), Inputs(("v",), stream=s, name=f"v_{s}")
        )]  # fmt: skip
        with attend(opened, readings) as run, torch.no_grad():
            opened.model(**prompt.inputs, **quiet(opened.model))
        found = {}
        for stream in streams:
            if stream not in run.tree.children:
                continue
            node = run.tree[stream]
            weights = node[f"map_{stream}"].transpose("layer", "sample", "head", "query", "key")
            vectors = node[f"v_{stream}"].transpose("layer", "sample", "head", ..., "channel")
            sites = {s.layer: s for s in opened.sites if s.stream == stream and s.kind == "self"}
            rows = [
                self.measure(torch.as_tensor(alpha.values), torch.as_tensor(v.values), sites[int(layer)])
                for layer, alpha, v in zip(weights["layer"].values, weights, vectors, strict=True)
            ]
            place = {"layer": weights["layer"].values, "head": weights["head"].values}
            found[stream] = xr.Dataset({
                name: xr.DataArray(
                    np.stack([row[name] for row in rows]),
                    place | ({"top": list(self.top)} if rows[0][name].ndim > 1 else {}),
                    ("layer", "head", "top")[: 1 + rows[0][name].ndim],
                )
                for name in rows[0]
            })  # fmt: skip
        return found

    def measure(
        self, alpha: Float[Tensor, "sample head query key"], v: Float[Tensor, "sample head key channel"], site: Site
    ) -> dict[str, np.ndarray]:
        """Every measure of a layer's heads, averaged over samples and queries: [head] or [head, top]."""
        if self.vectors == "value_o":
            v = torch.einsum("shkc,hcd->shkd", v, site.W_O.detach().to(v))
        length = (alpha > 0).sum(-1, keepdim=True)
        alpha, few = alpha.nan_to_num(), length < self.row_min
        kept: dict[str, Tensor] = {}
        for suffix, first in (("", 0), ("_rest", 1)):
            each = [selection(alpha[..., first:], v[..., first:, :], n) for n in self.top]
            kept |= {f"{name}{suffix}": torch.stack([e[name] for e in each], -1) for name in MEASURES}
        kept["tokens"] = torch.special.entr(alpha).sum(-1).exp()
        kept["jacobian"] = softmax_jacobian_norm(alpha)
        rows = {name: x.masked_fill(few if x.ndim == few.ndim else few[..., 0], torch.nan) for name, x in kept.items()}
        return {name: x.nanmean((0, 2)).numpy() for name, x in rows.items()}

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {
            "selection_capacity": values["separable"].sel(top=self.n, drop=True),
            "selection_capacity_rest": values["separable_rest"].sel(top=self.n, drop=True),
            "selection_precision": values["precision"].sel(top=self.n, drop=True),
            "effective_tokens": values["tokens"],
            "softmax_jacobian": values["jacobian"],
        }

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {f"selection_curve_{name}{end}": values[f"{name}{end}"] for name in MEASURES for end in ("", "_rest")}


def selection(
    alpha: Float[Tensor, "*batch query key"], vectors: Float[Tensor, "*batch key channel"], n: int
) -> dict[str, Float[Tensor, "*batch query"]]:
    """The measures of the file's head for the `n` largest weights of each query. Keys with weight 0 are not there."""
    alpha = alpha.nan_to_num()
    seen, length = alpha > 0, (alpha > 0).sum(-1)
    value, index = alpha.topk(min(n, alpha.shape[-1]), dim=-1)
    chosen = torch.zeros_like(seen).scatter(-1, index, value > 0)
    s = (alpha * chosen) @ vectors
    square = alpha.square() * vectors.square().sum(-1)[..., None, :]
    distance = (square - 2 * alpha * (s @ vectors.mT) + s.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    others, inside = seen & ~chosen, seen & chosen
    nearest = distance.masked_fill(~others, torch.inf).amin(-1, keepdim=True)
    farthest = distance.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
    total = (distance * others).sum(-1)
    confused = (others & (distance <= farthest)).sum(-1)
    found = {
        "distance_mean": total / others.sum(-1),
        "distance_sum": total,
        "separable": (inside & (distance < nearest)).sum(-1) / n,
        "precision": n / (n + confused),
    }
    return {name: x.masked_fill(length <= n, torch.nan) for name, x in found.items()}


def softmax_jacobian_norm(alpha: Float[Tensor, "*row key"], temperature: float = 1.0) -> Float[Tensor, "*row"]:
    """Spectral norm of the softmax's Jacobian `(diag(a) - a a^T) / T`, for rows of weights: at most 1/(2T).

    The largest eigenvalue lies between the two largest weights, where it solves `sum_j a_j^2 / (a_j - x) = 1`; found by
    bisection in O(keys) a step (power iteration would stall where two weights are close)."""
    if temperature <= 0:
        raise HeadwiseError(f"temperature: wanted a number above 0; got {temperature!r}.")
    a = alpha.double()
    if a.shape[-1] < 2:
        return torch.zeros(a.shape[:-1], dtype=a.dtype, device=a.device)
    high, low = (x.squeeze(-1).clone() for x in a.topk(2, dim=-1).values.split(1, -1))
    for _ in range(60):
        x = (high + low) / 2
        gap = a - x[..., None]
        total = (a.square() / torch.where(gap == 0, torch.finfo(a.dtype).tiny, gap)).sum(-1)
        high, low = torch.where(total > 1, x, high), torch.where(total > 1, low, x)
    return (high + low) / 2 / temperature


def expected_distance(alpha: Float[Tensor, " key"], vectors: Float[Tensor, "key channel"], n: int) -> float:
    """`E |s - y_j|^2` over a random set S of `n` keys and a random key j outside of it, exactly, from the moments of
    `G_ik = <y_i, y_k>`; the curve that the selection by weight is compared with."""
    y = alpha[:, None] * vectors
    length = len(y)
    if not 0 < n < length:
        raise HeadwiseError(f"n: wanted 1 to {length - 1} of {length} keys; got {n}.")
    own = y.square().sum().item() / length
    pairs = (y.sum(0).square().sum().item() - own * length) / (length * (length - 1))
    return n * own + n * (n - 1) * pairs + own - 2 * n * pairs


def critical_top(distance: Float[np.ndarray, " top"], top: Int[np.ndarray, " top"], tol: float = 0.5) -> int | None:
    """The smallest N whose distance is below `tol` times the largest before it; None where there is none."""
    peak = np.maximum.accumulate(distance)
    below = np.nonzero(np.asarray(distance) < tol * peak)[0]
    return int(top[below[0]]) if len(below) else None
