"""How alike are the layers of two models (or of one) on the same inputs?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xarray as xr

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.features import Rows, layer_features
from headwise.scan.similarity import grid


def layer_similarity(
    model_a: Opened,
    model_b: Opened,
    inputs: Sequence[Any],
    method: str = "lincka",
    rows: Rows = "token",
    stream: str | None = None,
    var: float = 0.99,
    bandwidth: float = 1.0,
) -> xr.DataArray:
    """Similarity of every layer of `model_a` to every layer of `model_b` (which may be the same one), with dims
    layer_a, layer_b; `method` and its settings as in `similarity`.

    `rows="word"` compares models that split words differently, "mean" and "last" one vector an input. Use ten times as
    many rows as the layers have columns for SVCCA and PWCCA; rbfcka holds a row x row matrix per layer.
    """
    a = layer_features(model_a, inputs, rows, stream)
    b = a if model_a is model_b else layer_features(model_b, inputs, rows, stream)
    if a.shape[1] != b.shape[1]:
        raise HeadwiseError(
            f"inputs: {model_a.name} makes {a.shape[1]} {rows}s of them and {model_b.name} {b.shape[1]}; compare them "
            'with rows="word" or rows="mean".'
        )
    found = grid(a, b, method, var, bandwidth)
    return found.assign_attrs(rows=rows, model_a=model_a.name, model_b=model_b.name)
