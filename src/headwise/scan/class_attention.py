"""Do tokens of one class (a topic, a part of speech, a document) attend to each other?

Over all ordered pairs of labelled tokens i, j that the mask allows, i != j: the mean weight a_ij where both are the
same token, where they are different tokens of one class, and where their classes differ. The same token is kept apart,
as it would fake a class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from headwise.attention import attend
from headwise.attention.readings import At, Propagate, Reading, Scores
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.needs import quiet
from headwise.scan.pool import pool

PAIRS = ("same_token", "same_class", "other")


def class_attention(
    opened: Opened,
    inputs: Sequence[Mapping[str, Any]],
    labels: Sequence[Int[Tensor, " token"]],
    tokens: Sequence[Int[Tensor, " token"]] | None = None,
    stream: str = "text",
) -> xr.Dataset:
    """`same_token`, `same_class` and `other` [layer, head]: mean weights over the pairs of each kind, and their counts.

    `inputs` are single sequences; `labels` number each token's class, -1 for tokens of none (special tokens and
    padding belong there). `tokens` says which tokens count as the same (None: the input ids)."""
    kinds = [batch["input_ids"][0] for batch in inputs] if tokens is None else tokens
    if not len(inputs) == len(labels) == len(kinds):
        raise HeadwiseError(
            f"class_attention wants labels and tokens for each of the {len(inputs)} inputs; got {len(labels)}, "
            f"{len(kinds)}."
        )
    found = []
    for batch, label, kind in zip(inputs, labels, kinds, strict=True):
        readings = class_readings(label.cpu(), kind.cpu(), stream)
        with attend(opened, readings=readings) as run, torch.no_grad():
            opened.model(**batch, **quiet(opened.model))
        found.append(class_means(run.tree[stream].to_dataset(), label.cpu(), kind.cpu()))
    return pool(found).drop_vars([f"{pair}_sem" for pair in PAIRS])  # between inputs only, so not of use


def class_readings(labels: Int[Tensor, " token"], tokens: Int[Tensor, " token"], stream: str) -> list[Reading]:
    """What `class_means` needs to know of one sequence: the mass of every class, the weights of equal tokens, and
    whether a token sees the next one."""
    if labels.ndim != 1 or labels.shape != tokens.shape:
        raise HeadwiseError(
            f"labels: wanted one number for each token of one sequence; got shapes {tuple(labels.shape)} and "
            f"{tuple(tokens.shape)}."
        )
    queries = (labels >= 0).nonzero().flatten()
    if len(queries) < 2:
        raise HeadwiseError(f"labels: wanted at least two tokens with a class; got {len(queries)}.")
    classes = F.one_hot(labels.clamp(min=0).long()).float() * (labels >= 0)[:, None]
    rows = tuple(queries.tolist())
    return [
        Propagate(classes, queries=rows, stream=stream, name="class_mass"),
        At(targets=equal_places(labels, tokens), queries=rows, stream=stream, name="equal"),
        Scores(lags=(-1,), queries=rows, stream=stream, name="ahead"),
    ]


def equal_places(labels: Int[Tensor, " token"], tokens: Int[Tensor, " token"]) -> Int[Tensor, "token copy"]:
    """For every labelled token the places of all labelled tokens equal to it, itself included; -1 beyond."""
    places: dict[int, list[int]] = {}
    for place, (label, token) in enumerate(zip(labels.tolist(), tokens.tolist(), strict=True)):
        if label >= 0:
            places.setdefault(token, []).append(place)
    rows = [places.get(token, []) if label >= 0 else [] for label, token in zip(labels.tolist(), tokens.tolist())]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def class_means(values: xr.Dataset, labels: Int[Tensor, " token"], tokens: Int[Tensor, " token"]) -> xr.Dataset:
    """The mean weight of each kind of pair, and how many pairs there are, from the readings of one sequence."""
    queries = (labels >= 0).nonzero().flatten()
    label, token = labels[queries].numpy(), tokens[queries].numpy()
    place = ("layer", "head", "query")
    mass = values["class_mass"].isel(sample=0).transpose(*place, "column")
    equal = values["equal"].isel(sample=0).transpose(*place, "target").values
    causal = bool(values["ahead"].isnull().all())
    targets = equal_places(labels, tokens)[queries]
    same = labels[targets].numpy() == label[:, None]  # a token may stand in several classes
    itself = (targets == queries[:, None]).numpy()
    own = np.take_along_axis(mass.values, label[None, None, :, None], -1)[..., 0]
    masses = {
        "same_token": (equal * ~itself).sum(-1),
        "same_class": own - (equal * same).sum(-1),
        "other": mass.values.sum(-1) - own - (equal * ~same).sum(-1),
    }
    order = np.arange(len(queries))
    seen = order[None, :] < order[:, None] if causal else order[None, :] != order[:, None]
    alike, classed = token[:, None] == token[None, :], label[:, None] == label[None, :]
    pairs = {"same_token": seen & alike, "same_class": seen & ~alike & classed, "other": seen & ~alike & ~classed}
    found: dict[str, Any] = {}
    for kind in PAIRS:
        count = int(pairs[kind].sum())
        found[kind] = (place[:2], np.maximum(masses[kind].sum(-1), 0) / count if count else own.sum(-1) * np.nan)
        found[f"{kind}_count"] = (place[:2], np.full(own.shape[:2], count))
    return xr.Dataset(found, {"layer": mass["layer"].values, "head": mass["head"].values})


def embedding_contrast(embedding: Float[Tensor, "token dim"], labels: Int[Tensor, " token"]) -> dict[str, float]:
    """Mean inner products of labelled embeddings: of a token with itself, of different tokens of one class, and of
    tokens of different classes (keys as in `class_attention`)."""
    if embedding.ndim != 2 or labels.shape != embedding.shape[:1]:
        raise HeadwiseError(
            f"labels: wanted one for each of the {len(embedding)} embeddings; got shape {tuple(labels.shape)}."
        )
    chosen = labels >= 0
    x, label = embedding[chosen].detach().double(), labels[chosen]
    products, classed = x @ x.T, label[:, None] == label[None, :]
    itself = torch.eye(len(x), dtype=torch.bool)
    kinds = {"same_token": itself, "same_class": classed & ~itself, "other": ~classed}
    return {kind: float(products[pairs].mean()) for kind, pairs in kinds.items()}
