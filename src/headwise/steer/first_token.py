"""The lever that the first token is: how much each head gives it, and what a little more or less would do.

With a gain g on the first token (weight a_0) a row becomes `g a_0 / D` and `a_i / D` with `D = 1 + (g - 1) a_0`. At
g = 1 the row's entropy H has the slope `-a_0 (log a_0 + H)` by log g; the slope of anything the model computes comes
from one pass back through D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from headwise.attention import Entropy, Mass, Reweight, attend
from headwise.attention.engine import force_path
from headwise.models import Opened
from headwise.steer.method import every_head


def first_token_leverage(opened: Opened, batch: Mapping[str, Any]) -> xr.Dataset:
    """Per layer and head, as the mean over queries and samples: `mass` on the first token (position 0), and
    `entropy_slope`, the slope of the row's entropy (nats) by the log of the first token's gain."""
    stream = "text" if "text" in opened.streams else opened.streams[0]
    readings = [Mass(("first",), stream=stream), Entropy(stream=stream)]
    with attend(opened, readings=readings) as run, torch.no_grad():
        opened.model(**batch)
    node = run.tree[stream].to_dataset()
    mass = node["mass"].isel(segment=0, drop=True)
    slope = -mass * (xr.ufuncs.log(mass.clip(min=1e-30)) + node["entropy"])
    return xr.Dataset({"mass": mass, "entropy_slope": slope}).mean(["sample", "query"]).transpose("layer", "head")


def first_token_slopes(opened: Opened, measure: Callable[[], Float[Tensor, ""]]) -> Float[Tensor, "layer head"]:
    """The slope of `measure()`, which runs the model, by the log of each head's gain on the first token, at gain 1:
    all heads from one pass forward and one back."""
    every = every_head(opened)
    log_gain = torch.zeros([1 + max(column) for column in zip(*every, strict=True)], device=opened.device)
    log_gain.requires_grad_()
    edits = [Reweight(partial(gained, row), groups=("first", "*"), layer=layer) for layer, row in enumerate(log_gain)]
    with torch.enable_grad(), force_path("dense"), attend(opened, edits=edits):
        return torch.autograd.grad(measure(), log_gain)[0].cpu()


def gained(
    log_gain: Float[Tensor, " head"], masses: Float[Tensor, "batch head query 2"]
) -> Float[Tensor, "batch head query 2"]:
    """The weights of the first token and of all others."""
    gain = log_gain.exp()[:, None]
    scale = 1 / (1 + (gain - 1) * masses[..., 0])
    return torch.stack([gain * scale, scale], -1)
