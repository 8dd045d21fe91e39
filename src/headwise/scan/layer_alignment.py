"""The alignment of every layer, or every head, with a target; and whether a layer in the middle is the best one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.alignment import align
from headwise.scan.features import Rows, head_features, layer_features


def layer_alignment(
    opened: Opened,
    target: Opened | Float[Tensor, "row column"] | np.ndarray,
    inputs: Sequence[Any],
    method: str = "cka",
    rows: Rows = "last",
    level: Literal["layer", "head"] = "layer",
    stream: str | None = None,
    **settings: Any,
) -> xr.DataArray:
    """`align` of the residual stream after every layer (or, with `level="head"`, of every head's output) with a target:
    a matrix with a row for every input (or token, or word, as `rows` says), which gives dims layer or layer, head; or
    another model, which gives layer_a, layer_b by the layers of that model. `settings` go to `align`.

    A mean over tokens flattens the curve of causal models: "last" is the fair default there.
    """
    if level not in ("layer", "head"):
        raise HeadwiseError(f'level: wanted "layer" or "head"; got {level!r}.')
    features = (layer_features if level == "layer" else head_features)(opened, inputs, rows, stream)
    if isinstance(target, Opened):
        if level == "head":
            raise HeadwiseError("level: heads are aligned with a matrix; give one, such as layer_features(...)[layer].")
        others = layer_features(target, inputs, rows, stream)
        grid = [[align(x, z, method, **settings).value for z in others] for x in features]
        return xr.DataArray(grid, {"layer_a": range(len(features)), "layer_b": range(len(others))}, name="alignment")
    return curve(features, target, method, **settings)


def curve(features: Float[Tensor, "layer *head row dim"], target: Any, method: str, **settings: Any) -> xr.DataArray:
    """The alignment of every layer (and head) of given features."""
    dims = ("layer", "head")[: features.ndim - 2]
    values = [align(x, target, method, **settings).value for x in features.flatten(0, -3)]
    coords = {dim: range(size) for dim, size in zip(dims, features.shape, strict=False)}
    return xr.DataArray(
        np.reshape(values, features.shape[:-2]), coords, dims, name="alignment", attrs={"method": method}
    )


@dataclass(frozen=True)
class Advantage:
    """Where a curve over layers peaks. `depth` is (layer + 1) / layers, so that the last layer has 1; `advantage` is
    the peak less the last layer; `low`, `high` its 95% interval over stimuli, where it was asked for."""

    layer: int
    depth: float
    peak: float
    last: float
    advantage: float
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ila_index(scores: xr.DataArray | Sequence[float]) -> Advantage:
    """The intermediate-layer advantage of one curve over layers."""
    values = np.asarray(scores, float)
    if values.ndim != 1 or len(values) < 2:
        raise HeadwiseError(f"scores: wanted one score a layer, of two layers or more; got shape {values.shape}.")
    best = int(np.nanargmax(values))
    peak, last = float(values[best]), float(values[-1])
    return Advantage(best, (best + 1) / len(values), peak, last, peak - last)


def ila_interval(
    features: Float[Tensor, "layer row dim"],
    target: Float[Tensor, "row column"],
    method: str = "cka",
    draws: int = 100,
    share: float = 0.8,
    seed: int = 0,
    **settings: Any,
) -> Advantage:
    """`ila_index` with an interval from random subsets of the stimuli: the layer that is best on all is compared with
    the last on each. Subsets without repeats, as a stimulus drawn twice would be its own nearest neighbour; their
    spread is scaled by `sqrt(share / (1 - share))` to that of new samples (Politis and Romano, 1994)."""
    if not 0 < share < 1:
        raise HeadwiseError(f"share: wanted a share of the stimuli between 0 and 1; got {share!r}.")
    target = torch.as_tensor(target)
    whole = ila_index(curve(features, target, method, **settings))
    generator, found = torch.Generator().manual_seed(seed), []
    extra = settings.pop("nuisance", None)
    for _ in range(draws):
        some = torch.randperm(len(target), generator=generator)[: int(share * len(target))].sort().values
        part = settings | ({} if extra is None else {"nuisance": torch.as_tensor(extra)[some]})
        best, last = (align(features[n][some], target[some], method, **part).value for n in (whole.layer, -1))
        found.append(best - last)
    spread = (np.asarray(found) - np.mean(found)) * np.sqrt(share / (1 - share))
    low, high = whole.advantage + np.quantile(spread, [0.025, 0.975])
    return Advantage(**asdict(whole) | {"low": float(low), "high": float(high)})
