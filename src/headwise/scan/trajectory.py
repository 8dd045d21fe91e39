"""How a model's attention changes while it is trained: entropies of the heads and stable ranks over checkpoints.

JoMA's picture is read from these two: with a nonlinear feed-forward part the entropy of attention first falls (salient
tokens are learnt), then rises again, while the stable rank `||W||_F^2 / ||W||_2^2` of the matrix below the activation
falls and rises a little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention import attend
from headwise.attention.readings import Entropy
from headwise.errors import HeadwiseError
from headwise.models import Opened, open_model
from headwise.models.blocks import Block, attends, find_blocks, is_matrix
from headwise.paper import Paper
from headwise.scan.needs import quiet

PAPER = Paper("JoMA: Demystifying Multilayer Transformers via JOint Dynamics of MLP and Attention", "2310.00535")


def entropy_trajectory(
    checkpoints: Iterable[tuple[int, nn.Module | Opened]], inputs: Mapping[str, Any], stream: str | None = None
) -> xr.Dataset:
    """`entropy` [step, layer, head] in nats, the mean over all rows of `inputs`, and `stable_rank` [step, layer] of the
    first matrix of every feed-forward part (nan where a block has none).

    `checkpoints` are (step, model) pairs of one architecture; they are taken one at a time, so a generator that loads
    them needs the memory of one: `((n, open_model(NAME, revision=f"step{n}")) for n in (1, 512, 143000))`. Every
    checkpoint reads the same inputs, hence the same rows: entropies of different steps compare although causal rows
    differ in length. `stream` None is the text, or the model's first.
    """
    steps, entropies, ranks = [], [], []
    for step, model in checkpoints:
        opened = model if isinstance(model, Opened) else open_model(model)
        chosen = stream or ("text" if "text" in opened.streams else opened.streams[0])
        with attend(opened, readings=[Entropy(per="head", stream=chosen)]) as run, torch.no_grad():
            opened.model(**inputs, **quiet(opened.model))
        entropies.append(run.tree[chosen]["entropy"].transpose("layer", "head"))
        matrices = [lower_matrix(block) for block in find_blocks(opened.model, opened.sites, chosen)]
        ranks.append([np.nan if m is None else stable_rank(m.weight) for m in matrices])
        steps.append(int(step))
    if not steps or steps != sorted(set(steps)):
        raise HeadwiseError(f"checkpoints: wanted (step, model) pairs with rising steps; got steps {steps}.")
    entropy = xr.concat(entropies, xr.IndexVariable("step", steps)).drop_vars("call", errors="ignore")
    return xr.Dataset({"entropy": entropy, "stable_rank": (("step", "layer"), ranks)})


def dip_and_rise(curve: xr.DataArray) -> xr.Dataset:
    """Of curves along `step`: `dip`, how far they fall from the first step to their lowest point; `rise`, how far they
    come back from there by the last step; `lowest`, the step of that point. Units are the curve's."""
    least = curve.min("step")
    return xr.Dataset(
        {
            "dip": curve.isel(step=0, drop=True) - least,
            "rise": curve.isel(step=-1, drop=True) - least,
            "lowest": curve.idxmin("step"),
        }
    )


def stable_rank(weight: Float[Tensor, "row column"]) -> float:
    """`||W||_F^2 / ||W||_2^2`: between 1 (one direction) and the rank; 0 for a matrix of zeros."""
    if weight.ndim != 2:
        raise HeadwiseError(f"stable_rank: wanted a matrix; got a tensor of shape {tuple(weight.shape)}.")
    values = torch.linalg.svdvals(weight.detach().double())
    return float((values / values.max().clamp(min=torch.finfo(values.dtype).tiny)).square().sum())


def lower_matrix(block: Block) -> nn.Module | None:
    """The first matrix of a block outside of its attention, where the feed-forward part has more than one."""
    inside = set(block.site.module.modules()) | {block.site.out}
    found = [m for m in block.module.modules() if m not in inside and is_matrix(m) and not attends(m, block.module)]
    return found[0] if block.last is not None and found[0] is not block.last else None
