"""What makes the first token a sink: a massive hidden state, a small key in the queries' direction, a small value.

Per head, of the first token against the mean of the others: norms of key and value, `cos(q_i, k_0)` against
`cos(q_i, k_j)`, its share of the value that flows, `received_j |v_j|`; and of queries that rest on it (weight above
`resting`) against those that don't: the norm of the head's output, small if resting means doing nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwise.attention import HeadOutput, Inputs, Mass, Received, attend
from headwise.attention.hidden import hidden
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import lacks_language_model, quiet
from headwise.scan.question import Column, Prompt, Question

KINDS = ("word", "piece", "number", "punctuation", "other")
STARTS = ("\u0120", "\u2581")
"""How vocabularies mark the start of a word, which decoding a token alone may hide."""


@dataclass(frozen=True)
class SinkAnatomy(Question):
    """`sink_anatomy`: how much better the queries' direction fits the first key than the other keys, the difference of
    mean cosines. `sink_key_norm`, `sink_value_norm`: ratio of norms, first over the mean of the others. `sink_flow`:
    the first token's share of the value flow. `sink_output`: ratio of output norms, resting over other queries (nan
    where a text has not both).

    Keys, values and queries are those of the first and of `sample` evenly spread tokens. Profiles: `hidden_ratio`
    [layer], the norm of the hidden state entering the layer, first over the mean of the others (a massive activation);
    `sink_by_token` [layer, head, token_kind], the mean attention to the first token from queries of a kind: words,
    later pieces of words, numbers, punctuation, other.
    """

    sample: int = 128
    resting: float = 0.9
    paper: ClassVar[Paper] = Paper("Why do LLMs attend to the first token?", "2504.02732")
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sample < 2:
            raise HeadwiseError(f"SinkAnatomy(sample=...) must be at least 2 tokens; got {self.sample!r}.")
        if not 0 < self.resting < 1:
            raise HeadwiseError(f"SinkAnatomy(resting=...) must lie between 0 and 1; got {self.resting!r}.")

    def columns(self) -> tuple[Column, ...]:
        ratio = "first over the others"
        cosine = "How much nearer the first token's key is to the queries' direction than other keys are."
        key, value = (f"Norm of the first token's {w} over the mean of the others." for w in ("key", "value"))
        flow = "The first token's share of weights times value norms."
        out = "Norm of the head's output where it rests on the first token, over where it does not."
        return (
            Column(self.name, "Sink direction", cosine, "cosine", "queries point at the first key"),
            Column("sink_key_norm", "Sink key norm", key, ratio, "a long first key"),
            Column("sink_value_norm", "Sink value norm", value, ratio, "a long first value"),
            Column("sink_flow", "Sink value flow", flow, "share of value", "the first value is what it writes"),
            Column("sink_output", "Output at rest", out, "resting over other queries", "still writes when it rests"),
        )

    def lacks(self, opened: Opened) -> str | None:
        return lacks_language_model(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    @torch.no_grad()
    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        ids = prompt.inputs["input_ids"]
        mask = prompt.inputs.get("attention_mask")
        if ids.shape[1] < 3 or (mask is not None and not bool(mask.all())):
            raise HeadwiseError("SinkAnatomy reads texts of at least 3 tokens, one by one, without padding.")
        places = np.unique(np.linspace(0, ids.shape[1] - 1, self.sample).astype(int)).tolist()
        ratios: dict[int, float] = {}

        def look(layer: int, x: Tensor) -> None:
            norm = x.float().norm(dim=-1)
            ratios[layer] = float((norm[:, 0] / norm[:, 1:].mean(1)).mean())

        sums = [Received(stream="text"), Mass(("first",), stream="text"), HeadOutput("norm", stream="text")]
        vectors = [Inputs(("q", "k", "v"), queries=places, stream="text")]
        # Two runs of one forward pass: in one, the vectors would be padded to all the tokens the sums are for.
        with (
            attend(opened, readings=sums) as run,
            attend(opened, readings=vectors) as sampled,
            hidden(opened, {"block_in": look}),
        ):
            opened.model(**prompt.inputs, **quiet(opened.model))
        whole = run.tree["text"].to_dataset().sel(segment="first").drop_vars(["segment", "module"])
        found = first_against_others(sampled.tree["text"].to_dataset().drop_vars("module"))
        found |= self.at_rest(whole)
        received, value = whole["received"], found.pop("value_mean")
        first = received.isel(key=0, drop=True) * found.pop("value_first")
        found["flow"] = first / (first + (received.sum("key") - received.isel(key=0, drop=True)) * value)
        kinds = [token_kinds(opened, row) for row in ids.tolist()]
        found["by_token"] = by_kind(whole["mass"], xr.DataArray(kinds, dims=("sample", "query")))
        depth = [ratios[layer] for layer in whole["layer"].values.tolist()]
        seen = xr.Dataset(found).mean("sample")
        return {"text": seen.assign(hidden=("layer", depth))}

    def at_rest(self, whole: xr.Dataset) -> dict[str, xr.DataArray]:
        """Norms of the outputs of resting queries over those of the others. The first query has no choice: left out."""
        size, resting = (
            x.isel(query=slice(1, None)) for x in (whole["head_output_norm"], whole["mass"] > self.resting)
        )
        return {"output": size.where(resting).mean("query") / size.where(~resting).mean("query")}

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {self.name: "cosine", "sink_key_norm": "key_norm", "sink_value_norm": "value_norm"}
        names |= {"sink_flow": "flow", "sink_output": "output"}
        return {f"{column}{end}": values[f"{name}{end}"] for column, name in names.items() for end in ("", "_sem")}

    def profiles(self, values: xr.Dataset) -> Mapping[str, xr.DataArray]:
        return {"hidden_ratio": values["hidden"], "sink_by_token": values["by_token"]}


def first_against_others(vectors: xr.Dataset) -> dict[str, xr.DataArray]:
    """Norms and cosines of the first token's key and value against the mean of the others."""
    q, k, v = (vectors[f"input_{w}"] for w in "qkv")
    v = v.rename({v.dims[-1]: "channel"})  # values of another width have a dim of their own
    norm = {name: np.sqrt((x**2).sum("channel")) for name, x in (("q", q), ("k", k), ("v", v))}
    others = slice(1, None)
    direction = (q / norm["q"]).isel(query=others)
    unit = k / norm["k"]
    # The mean cosine over pairs is the product of the mean directions; a query sees its own and earlier keys only.
    first = (direction * unit.isel(key=0, drop=True)).sum("channel").mean("query")
    running = unit.isel(key=others).cumsum("key") / xr.DataArray(np.arange(1, unit.sizes["key"]), dims="key")
    earlier = (direction.rename(query="key") * running).sum("channel").mean("key")
    mean = {name: norm[name].isel(key=others).mean("key") for name in ("k", "v")}
    return {
        "cosine": first - earlier,
        "key_norm": norm["k"].isel(key=0, drop=True) / mean["k"],
        "value_norm": norm["v"].isel(key=0, drop=True) / mean["v"],
        "value_first": norm["v"].isel(key=0, drop=True),
        "value_mean": mean["v"],
    }


def by_kind(mass: xr.DataArray, kinds: xr.DataArray) -> xr.DataArray:
    """Mean attention to the first token, by what the query's token is; the first query is left out."""
    later = slice(1, None)
    means = [mass.isel(query=later).where(kinds.isel(query=later) == kind).mean("query") for kind in KINDS]
    return xr.concat(means, xr.DataArray(list(KINDS), dims="token_kind", name="token_kind"))


def token_kinds(opened: Opened, ids: Sequence[int]) -> list[str]:
    """word (begins one), piece (goes on with one), number, punctuation, other (spaces, special tokens)."""
    tokenizer: Any = opened.tokenizer
    if tokenizer is None:
        return ["other"] * len(ids)
    written = [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
    marks = any(token.startswith(STARTS) for token in written)
    kinds, before = [], " "
    for number, token in zip(ids, written):
        text = str(opened.decode([number]))
        bare = text.strip()
        within = marks and not token.startswith(STARTS) and before[-1:].isalnum()
        if number in tokenizer.all_special_ids or not bare:
            kind = "other"
        elif bare.isnumeric():
            kind = "number"
        elif not any(c.isalnum() for c in bare):
            kind = "punctuation"
        else:
            kind = "piece" if within or token.startswith("##") else "word"
        kinds.append(kind)
        before = text
    return kinds
