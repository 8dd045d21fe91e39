"""Holding a run's labelled result to the truth, call by call."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn

import headwise as hw

from .family import Batch, Call, Family, build
from .truth import PLACES, SEGMENTS, reduce

TOLERANCE = 1e-5
READINGS = [hw.Mass(segments=SEGMENTS), hw.Mass(name="place"), hw.Entropy(), hw.Top(1), hw.Distance(), hw.Map()]


NAMED = {"mass": SEGMENTS, "place": PLACES}
"""Two Mass readings share the segment dim: each is nan at the other's names."""


def own_model(family: Family) -> nn.Module:
    """The model on the back end it comes with: sdpa, or eager where its authors allow no other."""
    if "attn_logit_softcapping" in family.config:
        return build(family, "eager")  # before transformers 5.23 sdpa took such a model and left its softcap out
    try:
        return build(family, "sdpa")
    except ValueError as error:
        if "does not support" not in str(error):
            raise
        return build(family, "eager")


def call_of(run: object, stream: str, layer: int, name: str, number: int) -> np.ndarray:
    """[sample, head, query, ...] of one reading for one call of one layer."""
    array = run.tree[stream][name].sel(layer=layer)
    if name in NAMED:
        array = array.sel(segment=list(NAMED[name]))
    if "call" in array.dims:
        array = array.sel(call=number)
    return array.transpose("sample", "head", "query", ...).values


def agree(run: object, calls: list[Call], batch: Batch) -> None:
    """Every reading of every call equals what the eager weights say, on every valid query."""
    sites = {site.name: site for site in run.session.sites}
    numbers: Counter[str] = Counter()
    for call in calls:
        site, number = sites[call.name], numbers[call.name]
        numbers[call.name] += 1
        truth = reduce(call.weights)
        samples, heads, queries, keys = call.weights.shape
        valid = valid_rows(batch, site.stream, samples, queries)
        for name, wanted in truth.items():
            got = call_of(run, site.stream, site.layer, name, number)[:samples, :heads, :queries]
            got = torch.as_tensor(got[..., :keys] if name == "map" else got).double()
            where = f"{name} of {call.name}, call {number}"
            assert got.shape == wanted.shape, where
            known = ~got.isnan().flatten(3).any(-1) if got.dim() > 3 else ~got.isnan()
            if valid is not None:
                assert torch.equal(known, valid[:, None].expand_as(known)), f"{where}: nan for padding and only there"
            assert known.any(), f"{where}: nothing but nan"
            scale = max(1.0, wanted[known].abs().max().item()) if name.startswith("distance") else 1.0
            gap = (got - wanted)[known].abs().max().item()
            assert gap <= TOLERANCE * scale, f"{where}: off by {gap:.2e}"
        top = torch.as_tensor(call_of(run, site.stream, site.layer, "top_index", number)[:samples, :heads, :queries])
        value = torch.as_tensor(truth["map"]).gather(-1, top.long().clamp(min=0))
        seen = top >= 0 if valid is None else valid[:, None, :, None].expand(top.shape)
        assert (top[seen] >= 0).all()
        assert (value - truth["top_value"])[seen].abs().max() <= TOLERANCE, f"top_index of {call.name}"


def valid_rows(batch: Batch, stream: str, samples: int, queries: int) -> Tensor | None:
    """[sample, query]: which queries are tokens; None where the padding mask is not about these queries."""
    mask = batch.get("attention_mask")
    if mask is None or stream not in ("text", "encoder") or tuple(mask.shape) != (samples, queries):
        return None
    return mask.bool()


def agree_folded(run: object, calls: list[Call], batch: Batch) -> None:
    """A prompt and the steps decoded after it are one sequence: row p of a layer is the call that had query p."""
    sites = {site.name: site for site in run.session.sites}
    leaders: dict[str, str] = {}
    ends: Counter[str] = Counter()
    for call in calls:
        site = sites[call.name]
        samples, heads, queries, keys = call.weights.shape
        if call.name == leaders.setdefault(site.stream, call.name):
            ends[site.stream] += queries
        if site.stream not in ("text", "decoder", "cross"):
            continue
        start = ends[site.stream] - queries  # a layer may be given the last queries only
        first = 0 if site.kind == "cross" else max(0, start + queries - keys)
        truth = reduce(call.weights, start, first)
        valid = valid_rows(batch, site.stream, samples, queries)
        for name in ("entropy", "top_value", "distance", "mass", "place"):
            rows = call_of(run, site.stream, site.layer, name, 0)[:samples, :heads, start : start + queries]
            got, wanted = torch.as_tensor(rows).double().transpose(1, 2), truth[name].transpose(1, 2)
            if valid is not None:
                got, wanted = got[valid], wanted[valid]
            scale = max(1.0, wanted.abs().max().item())
            gap = (got - wanted).abs().max().item()
            assert gap <= TOLERANCE * scale, f"{name} of {call.name} at query {start}: off by {gap:.2e}"
