"""Can every key be chosen? A key is selectable when some query scores it above all others.

Key i of a set K is selectable if and only if a q exists with `q . k_i > q . k_j` for all j != i: if it is a corner of
the set's convex hull. Keys of one length all are (q = k_i already wins), which is what the scaling of LayerNorm and
RMSNorm guarantees for the tokens in front of W_K; behind W_K, in the D dimensions of a head, nothing is guaranteed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attention import Inputs, attend
from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import quiet
from headwise.scan.norms import norms_before
from headwise.scan.question import Prompt, Question

PAPER = Paper("On the Expressivity Role of LayerNorm in Transformers' Attention", "2305.02582")
REFLECTIONS = 100


def unselectable(
    keys: Float[Tensor, "key dim"],
    method: Literal["reflect+lp", "lp"] = "reflect+lp",
    bound: float = 100.0,
    tol: float = 1e-8,
) -> Bool[Tensor, " key"]:
    """Which keys no query can choose. Keys that are equal (to 9 decimals of the set's size) count as one point.

    One linear program a key: `max r` with `q . (k_j - k_i) + |k_j - k_i| r <= 0` for all j and `|q|_inf <= bound`; a
    key with r < `tol` is unselectable. "reflect+lp" first tries the query k_i itself, reflected at the hyperplane
    between key i and the key that wins, at most 100 times; only keys that never win are left to the program.
    """
    if keys.ndim != 2 or not bool(keys.isfinite().all()):
        raise HeadwiseError(f"keys: wanted finite numbers of shape [key, dim]; got shape {tuple(keys.shape)}.")
    if method not in ("reflect+lp", "lp"):
        raise HeadwiseError(f'method: wanted "reflect+lp" or "lp"; got {method!r}.')
    points = keys.detach().double().cpu()
    points = points - points.mean(0)  # moving all keys alike adds one number to all scores
    points = points / points.norm(dim=-1).max().clamp(
        min=1e-300
    )  # so that `bound` and `tol` mean the same for all sets
    points, which = points.round(decimals=9).unique(dim=0, return_inverse=True)
    open_ = ~reached(points) if method == "reflect+lp" else torch.ones(len(points), dtype=torch.bool)
    found = torch.zeros(len(points), dtype=torch.bool)
    for i in open_.nonzero().flatten().tolist():
        found[i] = margin(points, i, bound) < tol
    return found[which].to(keys.device)


def reached(keys: Float[Tensor, "key dim"]) -> Bool[Tensor, " key"]:
    """Keys that win under some reflection of their own direction: proof that they are selectable."""
    own = torch.arange(len(keys))
    q, won = keys.clone(), torch.zeros(len(keys), dtype=torch.bool)
    for _ in range(REFLECTIONS):
        scores = q @ keys.T
        mine = scores.diagonal().clone()
        scores.fill_diagonal_(-torch.inf)
        best, rival = scores.max(-1) if len(keys) > 1 else (torch.full_like(mine, -torch.inf), own)
        won |= mine > best
        if won.all():
            break
        across = nn.functional.normalize(keys - keys[rival], dim=-1)
        flipped = q - 2 * (q * across).sum(-1, keepdim=True) * across
        q = torch.where(won[:, None], q, flipped)
    return won


def margin(keys: Float[Tensor, "key dim"], i: int, bound: float) -> float:
    """The largest r of the linear program for key i."""
    linprog = need("scipy.optimize", "analysis").linprog
    gaps = (keys - keys[i])[torch.arange(len(keys)) != i].numpy()
    if not len(gaps):
        return float("inf")
    rows = np.concatenate([gaps, np.linalg.norm(gaps, axis=1, keepdims=True)], axis=1)
    aim = np.zeros(rows.shape[1])
    aim[-1] = -1.0
    solved = linprog(aim, rows, np.zeros(len(rows)), bounds=[(-bound, bound)] * keys.shape[1] + [(0, None)])
    return float(solved.x[-1]) if solved.success else 0.0


@dataclass(frozen=True)
class UnselectableKeys(Question):
    """`unselectable_keys`: share of a head's keys (as the attention call gets them) that no query could choose.
    Profiles `unselectable_before` and `unselectable_after` (layer): the same for the tokens before and after the norm
    in front of the attention. At most `keys` tokens of an input are looked at, evenly spread; a set of no more than
    D + 1 keys is almost always selectable whole, so give inputs of many more tokens than the head dim."""

    keys: int = 256
    paper: ClassVar[Paper] = PAPER
    title: ClassVar[str] = "Keys no query can choose"
    what: ClassVar[str] = "Share of the head's keys that no query whatever would score above all other keys."
    unit: ClassVar[str] = "share of keys"
    higher: ClassVar[str] = "many tokens can never be looked at most"
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keys < 2:
            raise HeadwiseError(f"UnselectableKeys(keys=...) must be at least 2; got {self.keys!r}.")

    def streams(self, opened: Opened) -> Sequence[str]:
        return list(dict.fromkeys(site.stream for site in opened.sites if site.kind == "self"))

    def lacks(self, opened: Opened) -> str | None:
        return None if self.streams(opened) else "self-attention"

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        found = {}
        for stream in self.streams(opened):
            with attend(opened, [Inputs(("k",), stream=stream)]) as run, torch.no_grad():
                opened.model(**prompt.inputs, **quiet(opened.model))
            if stream not in run.tree.children:
                continue
            keys = run.tree[stream]["input_k"].transpose("sample", "layer", "head", ..., "channel")
            groups = {s.layer: s.group for s in opened.sites if s.stream == stream}
            rates = keys.isel({keys.dims[3]: 0, "channel": 0}, drop=True).astype(float).copy()
            for sample in range(rates.sizes["sample"]):
                for place, layer in enumerate(rates["layer"].values.tolist()):
                    for head in range(0, rates.sizes["head"], groups[layer]):  # heads of a group share their keys
                        rates[sample, place, head : head + groups[layer]] = self.rate(keys.values[sample, place, head])
            data = {"keys": rates.mean("sample")}
            for side, tokens in around_norms(opened, prompt, stream).items():
                each = {layer: np.mean([self.rate(row.numpy()) for row in rows]) for layer, rows in tokens.items()}
                data[side] = xr.DataArray(list(each.values()), {"layer": list(each)}, ("layer",))
            found[stream] = xr.Dataset(data)
        return found

    def rate(self, keys: np.ndarray) -> float:
        """The share of unselectable ones among (some of) these; nan where there are none."""
        there = keys[~np.isnan(keys).any(-1)]
        if not len(there):
            return float("nan")
        chosen = there[np.unique(np.linspace(0, len(there) - 1, min(self.keys, len(there))).round().astype(int))]
        return unselectable(torch.as_tensor(chosen)).double().mean().item()

    def score(self, values: xr.Dataset) -> xr.DataArray:
        return values["keys"]

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {f"unselectable_{side}": values[side] for side in ("before", "after") if side in values}


@torch.no_grad()
def around_norms(opened: Opened, prompt: Prompt, stream: str) -> dict[str, dict[int, Float[Tensor, "batch token dim"]]]:
    """ "before" and "after" -> layer -> the tokens on that side of the norm in front of the layer's attention."""
    norms = norms_before(opened, prompt.inputs, stream)
    seen: dict[str, dict[int, Tensor]] = {"before": {}, "after": {}}

    def look(layer: int) -> object:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen["before"].setdefault(layer, args[0].float().cpu())
            seen["after"].setdefault(layer, output.float().cpu())

        return keep

    hooks = [norm.register_forward_hook(look(layer)) for layer, norm in norms.items()]  # type: ignore[arg-type]
    try:
        opened.model(**prompt.inputs, **quiet(opened.model))
    finally:
        for hook in hooks:
            hook.remove()
    return seen
