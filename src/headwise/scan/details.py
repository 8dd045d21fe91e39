"""What the report shows of every head besides the scores: how far it looks, mass per segment, entropy; rows for a few
heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr

from headwise.attention import attend
from headwise.attention.readings import Entropy, Mass, Reading, Top
from headwise.models import Opened
from headwise.scan.needs import ordered_streams, quiet
from headwise.scan.question import Prompt, Question

SAMPLE_TOKENS = 64
ROW_PAIRS = 8
PROFILE_QUERIES = 128
"""Each window of the distance profile costs a pass over the scores, so that it is read for random queries only."""


def edges(tokens: int) -> list[int]:
    """Borders of the distance bins: 0, 1, 2, 4, 8, ... up to the first power of two that no distance reaches."""
    borders = [0, 1]
    while borders[-1] < tokens:
        borders.append(2 * borders[-1])
    return borders


@dataclass(frozen=True)
class Details(Question):
    """Asked silently beside the others, of the same forward passes. `tokens` is the length of the longest prompt."""

    tokens: int = 1

    def readings(self, opened: Opened) -> list[Reading]:
        windows = [f"window:{border - 1}" for border in edges(self.tokens)[1:]]
        profile = [
            Mass(windows, per="head", queries=PROFILE_QUERIES, stream=s, name=f"reach_{s}")
            for s in ordered_streams(opened)
        ]
        return [*profile, Entropy(per="head")]

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        named = prompt.segments if isinstance(prompt.segments, dict) else {}
        return [*self.readings(opened), *(Mass(per="head", stream=stream) for stream in named)]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        """The mass per distance bin (differences of the nested windows), per segment, and the entropy."""
        kept: dict[str, Any] = {"entropy": values["entropy"]}
        reach = [
            str(name)
            for name in values.data_vars
            if str(name).startswith("reach_") and not str(name).endswith(("_count", "_sem"))
        ]
        if reach:
            borders = edges(self.tokens)
            within = values[reach[0]].sel(segment=[f"window:{border - 1}" for border in borders[1:]])
            within = within.rename(segment="bin").assign_coords(bin=borders[:-1])
            kept["bins"] = within.diff("bin").combine_first(within.isel(bin=[0])).clip(min=0)
        if "mass" in values:
            labels = [name for name in values["segment"].values.tolist() if not str(name).startswith("window:")]
            kept["mass"] = values["mass"].sel(segment=labels)
        return xr.Dataset(kept)


def sample_rows(opened: Opened, prompt: Prompt, chosen: dict[str, list[tuple[int, int]]]) -> dict[str, Any] | None:
    """The strongest weights of every query on the first tokens of a text, for chosen (layer, head) pairs of each
    stream.

    None where the input is not one sequence of token ids with a tokenizer."""
    ids = prompt.inputs.get("input_ids")
    if (
        opened.tokenizer is None
        or not isinstance(ids, torch.Tensor)
        or set(prompt.inputs) - {"input_ids", "attention_mask", "token_type_ids"}
    ):
        return None
    ids = ids[:1, :SAMPLE_TOKENS]
    readings: list[Reading] = []
    for stream, pairs in chosen.items():
        for layer in sorted({layer for layer, _ in pairs}):
            heads = sorted(head for where, head in pairs if where == layer)
            readings.append(Top(ROW_PAIRS, layers=layer, heads=heads, stream=stream, name=f"rows_{layer}"))
    with attend(opened, readings=readings) as run, torch.no_grad():
        opened.model(input_ids=ids, **quiet(opened.model))
    rows: dict[str, Any] = {}
    for stream, pairs in chosen.items():
        node = run.tree[stream]
        for layer, head in pairs:
            name = f"rows_{layer}"
            value = node[name].sel(layer=layer, head=head).isel(sample=0).transpose("query", "rank").values
            place = (
                node[f"{name}_top_index"].sel(layer=layer, head=head).isel(sample=0).transpose("query", "rank").values
            )
            rows[f"{stream}:{layer}:{head}"] = [
                [[int(j), round(float(w), 4)] for j, w in zip(js, ws, strict=True) if j >= 0 and w > 5e-4]
                for js, ws in zip(place, value, strict=True)
            ]
    return {"tokens": [opened.tokenizer.decode([token]) for token in ids[0].tolist()], "rows": rows}
