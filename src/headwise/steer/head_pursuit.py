"""Head pursuit: what a head writes, said in few atoms of a dictionary (`somp`), or in one as the logit lens does.

One row a sample: `z_h W_O`, the head's part in the residual stream, at the last token of a prompt or at every token
from which the model writes on. The dictionary is the unembedding, or any matrix [atom, dim] in the residual space, such
as a classifier's rows or class prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from headwise.attention import HeadOutput, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.steer.method import check_per_head, every_head, pairs
from headwise.steer.pursuit import somp

Rows = Float[Tensor, "row layer head channel"]


@torch.no_grad()
def head_rows(
    opened: Opened, inputs: Sequence[Any], position: int = -1, tokens: int = 1, average: bool = False
) -> Rows:
    """The outputs of all heads at one position of every input (a text, or whatever `encode` takes), or with `tokens`
    above 1 at all positions from which the model's greedy continuation is written, the last of the prompt being the
    first of them. `average` makes their mean the input's one row."""
    if tokens < 1 or (tokens > 1 and position != -1):
        raise HeadwiseError(
            f"tokens: wanted at least 1, and with more than 1 position=-1; got {tokens} and {position}."
        )
    if not len(inputs) or isinstance(inputs, str):
        raise HeadwiseError(f"inputs: wanted a list of one or more texts; got {inputs!r}.")
    stream = every_stream(opened)
    found = []
    for given in inputs:
        batch = opened.encode(given)
        places = [position]
        if tokens > 1:
            start = batch["input_ids"].shape[1]
            ids = opened.model.generate(**batch, max_new_tokens=tokens, do_sample=False)[:, :-1]
            batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            places = list(range(start - 1, ids.shape[1]))
        with attend(opened, readings=[HeadOutput(what="vector", queries=places, stream=stream)]) as run:
            opened.model(**batch)
        z = run.tree[stream]["head_output"].isel(sample=0).transpose("query", "layer", "head", "channel").values
        if not len(z):
            raise HeadwiseError(f"position: the input {given!r} has no token at {position}.")
        found.append(torch.tensor(z.mean(0, keepdims=True) if average else z, device=opened.device))
    return torch.cat(found)


def head_pursuit(
    opened: Opened,
    rows: Rows,
    dictionary: Float[Tensor, "atom dim"] | None = None,
    steps: int = 20,
    heads: Sequence[tuple[int, int]] | None = None,
    center: bool = True,
) -> xr.Dataset:
    """Per layer and head: `atom` [step], the rows of the dictionary (None: the unembedding, whose rows are tokens) in
    the order taken, -1 behind the last, and `explained` [step], the share of variance explained so far, 0 to 1. Heads
    not asked for (None: all are) have -1 and NaN. `center=False` keeps the rows' mean in, with which a head that always
    writes the same looks special."""
    if len(rows) < 2:
        raise HeadwiseError(f"rows: wanted two or more, as a head is judged by how it varies; got {len(rows)}.")
    dictionary = unembedding(opened) if dictionary is None else dictionary
    shape = (*rows.shape[1:3], steps)
    atom, explained = np.full(shape, -1), np.full(shape, np.nan)
    for layer, head, written in parts(opened, rows, heads):
        found = somp(written, dictionary, steps, center=center)
        taken = len(found.atoms)
        atom[layer, head, :taken] = found.atoms.cpu()
        explained[layer, head] = float(found.explained[-1]) if taken else 0.0
        explained[layer, head, :taken] = found.explained
    dims = ("layer", "head", "step")
    return xr.Dataset({"atom": (dims, atom), "explained": (dims, explained)})


def logit_lens(
    opened: Opened, rows: Rows, dictionary: Float[Tensor, "atom dim"], unit_atoms: bool = True
) -> Float[np.ndarray, "layer head"]:
    """What head pursuit is compared with: the mean over rows of the largest `|<row, atom>|`."""
    atoms = torch.nn.functional.normalize(dictionary, dim=-1) if unit_atoms else dictionary
    scores = np.zeros(rows.shape[1:3])
    for layer, head, written in parts(opened, rows):
        scores[layer, head] = float((written @ atoms.T).abs().amax(-1).mean())
    return scores


def parts(
    opened: Opened, rows: Rows, heads: Sequence[tuple[int, int]] | None = None
) -> Iterator[tuple[int, int, Float[Tensor, "row dim"]]]:
    """Layer, head, and what it writes to the residual stream."""
    sites = {site.layer: site for site in opened.sites if site.stream == every_stream(opened)}
    if rows.shape[-1] != next(iter(sites.values())).value_dim:
        raise HeadwiseError(f"rows: wanted the outputs of heads [row, layer, head, channel]; got {tuple(rows.shape)}.")
    check_per_head("rows", rows[0], opened)
    for layer, head in pairs(heads, opened) or every_head(opened):
        yield layer, head, rows[:, layer, head] @ sites[layer].W_O[head].detach().to(rows)


def every_stream(opened: Opened) -> str:
    return "text" if "text" in opened.streams else opened.streams[0]


def unembedding(opened: Opened) -> Float[Tensor, "vocabulary dim"]:
    """The unembedding rows, with the gain of the final norm in them: what raises a token's logit."""
    head = opened.model.get_output_embeddings() if hasattr(opened.model, "get_output_embeddings") else None
    if head is None:
        raise HeadwiseError(f"dictionary: {opened.name} has no unembedding; give a matrix [atom, dim] of your own.")
    rows = head.weight.detach().float()
    base = getattr(opened.model, opened.model.base_model_prefix, opened.model)
    norm = getattr(base, "norm", None) or getattr(base, "ln_f", None) or getattr(base, "final_layer_norm", None)
    gain = getattr(norm, "weight", None)
    rows = rows if gain is None else rows * gain.detach().float()
    return rows - rows.mean(-1, keepdim=True) if getattr(norm, "bias", None) is not None else rows
