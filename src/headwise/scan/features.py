"""What the layers, or the heads, of a model hold for a list of inputs: one row a token, a word or an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention import HeadOutput, attend
from headwise.attention.hidden import record
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.needs import quiet
from headwise.scan.run import evaluating
from headwise.scan.units import Units, encode_one, find_units, main_stream

Rows = Literal["token", "word", "mean", "last"]
ROWS = ("token", "word", "mean", "last")


def layer_features(
    opened: Opened, inputs: Sequence[Any], rows: Rows = "token", stream: str | None = None, place: str = "block_out"
) -> Float[Tensor, "layer row dim"]:
    """The residual stream after every block (or another `place` of `attention.hidden`), float32 on the CPU. A row is a
    token, a word (mean of its pieces), the mean over an input's tokens, or its last token."""

    def read(batch: dict[str, Tensor], where: str) -> Tensor:
        return record(opened, {**batch, **quiet(opened.model)}, (place,), stream=where)[place][:, 0]

    return _collect(opened, inputs, rows, stream, read)


def head_features(
    opened: Opened, inputs: Sequence[Any], rows: Rows = "token", stream: str | None = None
) -> Float[Tensor, "layer head row dim"]:
    """The output z of every head, before the output projection; rows as in `layer_features`."""

    def read(batch: dict[str, Tensor], where: str) -> Tensor:
        with attend(opened, readings=[HeadOutput("vector", stream=where)]) as run:
            opened.model(**batch, **quiet(opened.model))
        seen = run.tree[where]["head_output"].isel(sample=0)
        return torch.from_numpy(seen.transpose("layer", "head", "query", "channel").values)

    return _collect(opened, inputs, rows, stream, read)


def _collect(opened: Opened, inputs: Sequence[Any], rows: Rows, stream: str | None, read: Any) -> Tensor:
    if rows not in ROWS:
        raise HeadwiseError(f"rows: wanted one of {', '.join(ROWS)}; got {rows!r}.")
    if not len(inputs) or isinstance(inputs, str):
        raise HeadwiseError(f"inputs: wanted a list of texts, pictures or sounds; got {inputs!r}.")
    found = []
    with evaluating(opened.model):
        for given in inputs:
            batch = encode_one(opened, given)
            x = read(batch, main_stream(opened, batch, stream)).float().cpu()
            units = find_units(opened, given, x.shape[-2], "word" if rows == "word" else "token")
            found.append(pooled(x, units, rows))
    return torch.cat(found, -2)


def pooled(x: Float[Tensor, "... token dim"], units: Units, rows: Rows) -> Float[Tensor, "... row dim"]:
    if rows == "word":
        return units.means(x)
    x = x[..., : units.count, :]  # a padded sound's silence is left out
    return x if rows == "token" else x.mean(-2, keepdim=True) if rows == "mean" else x[..., -1:, :]
