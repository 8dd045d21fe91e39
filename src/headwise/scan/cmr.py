"""The Contextual Maintenance and Retrieval model of human free recall, and how closely a head's curve follows it.

A list of n items is studied, then recalled freely. Encoding writes the context-to-item memory `M = (I - (1 - beta_enc)
T)^-1 T` with the shift T (`T[i, i+1] = 1`), so `M[i, j] = (1 - beta_enc)^(j-i-1)` for j > i. Recall starts in the
context of one item and repeats: item f is drawn from `P = M^T t / sum(M^T t)`; its context is `(1 - gamma) f + gamma M
f`, brought to length 1; the context drifts, `t = (1 - beta_rec) t + beta_rec t_in`, and is brought to length 1 again.
The end of the list absorbs. The CRP (conditional response probability) of a lag is the share of steps from one recalled
item to the next that are that long.

Paper: Linking In-context Learning in Transformers to Human Episodic Memory, arXiv 2405.14992.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.extras import need

BETA_ENC = np.arange(1, 21) / 20
BETA_REC = np.arange(0, 21) / 20
GAMMA = np.arange(0, 11) / 10
PARAMETERS = ("beta_enc", "beta_rec", "gamma", "scale")
TABLE_LAG = 8
FLAT = 1e-10
"""A curve with less variance than this is flat: no model of it has a distance."""


def memory(beta_enc: float, items: int) -> Float[Tensor, "state state2"]:
    """M over the items and the end of the list, the last state."""
    state = torch.arange(items + 1)
    gap = state[None, :] - state[:, None] - 1
    return torch.where(gap >= 0, (1.0 - beta_enc) ** gap.clamp(min=0), 0.0).float()


def cmr_table(
    beta_enc: Sequence[float] = tuple(BETA_ENC),
    beta_rec: Sequence[float] = tuple(BETA_REC),
    gamma: Sequence[float] = tuple(GAMMA),
    sims: int = 1000,
    starts: int = 20,
    items: int = 100,
    most: int = 100,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Float[Tensor, "beta_enc beta_rec gamma lag"]:
    """CRP of lags -8 to 8 for every setting: `sims` simulated recalls from each of the first `starts` items, of at most
    `most` items each. Per recall the share of each lag among its steps is taken, these are averaged, brought to sum 1
    for each start, and averaged over the starts. All settings are simulated, also those with a closed form."""
    if min(sims, starts, most) < 1 or not starts <= items:
        raise HeadwiseError(f"cmr_table wants sims, starts, most >= 1, starts <= items; got {sims}, {starts}, {most}.")
    generator = torch.Generator(device).manual_seed(seed)
    shape = (len(beta_rec), len(gamma), starts, sims)
    drift = torch.tensor(beta_rec, dtype=torch.float32, device=device)
    drift = drift[:, None, None, None].expand(shape).reshape(-1, 1)
    which = torch.arange(len(gamma), device=device)[None, :, None, None].expand(shape).flatten()
    first = torch.arange(starts, device=device)[None, None, :, None].expand(shape).flatten()
    table = []
    for beta in beta_enc:
        m = memory(beta, items).to(device)
        eye = torch.eye(items + 1, device=device)
        incoming = torch.stack([unit((1 - g) * eye + g * m.T) for g in gamma])  # row f: the context item f brings
        count = walks(m, incoming, which, first, drift, most, generator)
        steps = count.sum(-1, keepdim=True)  # the last column counts longer lags
        share = (count / steps)[:, :-1].view(*shape, -1).nanmean(3)
        table.append((share / share.sum(-1, keepdim=True)).nanmean(2).cpu())
    return torch.stack(table)


def walks(
    m: Float[Tensor, "state state2"],
    incoming: Float[Tensor, "gamma state state2"],
    which: Tensor,
    first: Tensor,
    drift: Float[Tensor, "walk 1"],
    most: int,
    generator: torch.Generator,
) -> Float[Tensor, "walk bin"]:
    """Recalls side by side: how many steps of lag -8 ... 8 each took, and how many longer ones (the last column)."""
    end = len(m) - 1
    walk = torch.arange(len(first), device=m.device)
    context = torch.eye(len(m), device=m.device)[first]
    here = first
    count = torch.zeros(len(first), 2 * TABLE_LAG + 2, device=m.device)
    for _ in range(most):
        reach = (context @ m).cumsum(-1)
        draw = torch.rand(len(walk), 1, generator=generator, device=m.device) * reach[:, -1:]
        item = (reach <= draw).sum(-1).clamp(max=end)
        on = (item < end).nonzero().flatten()
        if not len(on):
            break
        walk, which, drift, here, item, context = (x[on] for x in (walk, which, drift, here, item, context))
        lag = item - here
        count[walk, torch.where(lag.abs() <= TABLE_LAG, lag + TABLE_LAG, 2 * TABLE_LAG + 1)] += 1
        context = unit((1 - drift) * context + drift * incoming[which, item])
        here = item
    return count


def unit(x: Float[Tensor, "... state"]) -> Float[Tensor, "... state"]:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)


@cache
def shipped_table() -> np.ndarray:
    """The table that comes with headwise, as [beta_enc, beta_rec, gamma, lag]: `cmr_table()` on one H100."""
    stored = load(files("headwise.scan").joinpath("assets/cmr.safetensors").read_bytes())
    return stored["crp"].double().numpy()


class CmrFit(NamedTuple):
    """`distance` [...]: nan where the curve is flat. `parameters` [..., 4]: beta_enc, beta_rec, gamma and the scale
    (how much higher the head's curve is than the CRP, an inverse temperature)."""

    distance: np.ndarray
    parameters: np.ndarray


def cmr_fit(curve: Float[np.ndarray, "... lag"], table: np.ndarray | None = None) -> CmrFit:
    """The CMR distance of curves over lags -m ... m (m at most 8), the odd number of points in their last dim.

    Curve a and model CRP c (cut to the same lags) have their minima subtracted, c is stretched to the maximum of a, and
    `d = mean((c' - a')^2) / var(a')` is minimised over the grid of the table."""
    table = shipped_table() if table is None else np.asarray(table, dtype=float)
    curve = np.asarray(curve, dtype=float)
    reach = curve.shape[-1] // 2
    if curve.shape[-1] % 2 == 0 or not 1 <= reach <= table.shape[-1] // 2:
        raise HeadwiseError(
            f"curve: wanted values at lags -m ... m, m from 1 to {table.shape[-1] // 2}; got {curve.shape[-1]} values."
        )
    middle = table.shape[-1] // 2
    model = table[..., middle - reach : middle + reach + 1].reshape(-1, 2 * reach + 1)
    model = model / model.sum(-1, keepdims=True)
    model = model - model.min(-1, keepdims=True)
    height = model.max(-1)
    shape = model / np.maximum(height, 1e-30)[:, None]
    flat = curve.reshape(-1, curve.shape[-1])
    head = flat - flat.min(-1, keepdims=True)
    variance = head.var(-1)
    known = np.isfinite(variance) & (variance > FLAT)
    distance, best = np.full(len(head), np.nan), np.zeros(len(head), dtype=int)
    for row in np.flatnonzero(known):
        error = ((shape * head[row].max() - head[row]) ** 2).mean(-1) / variance[row]
        best[row] = error.argmin()
        distance[row] = error[best[row]]
    grid = np.stack(np.meshgrid(BETA_ENC, BETA_REC, GAMMA, indexing="ij"), -1).reshape(-1, 3)
    scale = head.max(-1) / np.maximum(height[best], 1e-30)
    parameters = np.where(known[:, None], np.concatenate([grid[best], scale[:, None]], -1), np.nan)
    return CmrFit(distance.reshape(curve.shape[:-1]), parameters.reshape(*curve.shape[:-1], 4))


def gaussian_distance(curve: Float[np.ndarray, "... lag"]) -> np.ndarray:
    """The baseline: the same distance for the best `a + b exp(-(lag - mu)^2 / 2 sigma^2)`, by least squares. Needs
    scipy."""
    optimize = need("scipy.optimize", "analysis")
    curve = np.asarray(curve, dtype=float)
    reach = curve.shape[-1] // 2
    lag = np.arange(-reach, curve.shape[-1] - reach)

    def bell(x: np.ndarray, a: float, b: float, mu: float, sigma: float) -> np.ndarray:
        return a + b * np.exp(-((x - mu) ** 2) / (2 * sigma**2))

    def distance(one: np.ndarray) -> float:
        if not np.isfinite(one).all() or one.var() <= FLAT:
            return float("nan")
        span = np.ptp(one)
        low = [one.min() - span, 0, -reach, 0.1]
        high = [one.max(), 3 * span, reach, 3 * reach]
        fits = []
        for sigma in (0.5, 2.0):
            start = [one.min(), span, float(lag[one.argmax()]), sigma]
            found = optimize.least_squares(lambda p: bell(lag, *p) - one, start, bounds=(low, high))
            fits.append(2 * found.cost / len(one) / one.var())
        return min(fits)

    return np.apply_along_axis(distance, -1, curve)
