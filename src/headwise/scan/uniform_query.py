"""Does a head ask for nothing in particular? LayerNorm takes each token's mean off, so that a query along the all-ones
vector scores all keys alike: a ready-made "attend to everything equally".

Seen from the normalised token `z = (LN(x) - b) / g`, a head's query q scores key j by `z_j . (g * W_K q)`, plus what is
the same for all keys. The folded angle between `g * W_K q` and the ones vector is 0 where the head asks for a uniform
average and 90 (degrees) where it asks for something else; a random direction of d dimensions is about 90 - 46/sqrt(d).
The paper's LayerNorm has no gain; with one, multiplying by it is what makes the angle 0 if and only if all scores are
equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.scan.grid import grid
from headwise.scan.norms import gain, norms_before, removes_mean
from headwise.scan.question import Prompt, Question
from headwise.scan.unselectable import PAPER, around_norms


@dataclass(frozen=True)
class UniformQuery(Question):
    """`uniform_query`: the mean folded angle over tokens, in degrees. Queries as the weights make them from the norm's
    output, before any rotation by position (a rotating head asks so at its own place) and before norms of the query.

    Only for attention behind a LayerNorm: RMSNorm keeps the mean, so that it has no such query."""

    paper: ClassVar[Paper] = PAPER
    title: ClassVar[str] = "Angle to the uniform query"
    what: ClassVar[str] = "How far the head's queries are from the one that looks at all tokens alike."
    unit: ClassVar[str] = "degrees"
    higher: ClassVar[str] = "asks for something particular"
    drives: ClassVar[bool] = True

    def lacks(self, opened: Opened) -> str | None:
        has = any(isinstance(module, nn.LayerNorm) for module in opened.model.modules())
        return None if has and self.streams(opened) else "a LayerNorm in front of its self-attention"

    def streams(self, opened: Opened) -> Sequence[str]:
        return list(dict.fromkeys(site.stream for site in opened.sites if site.kind == "self"))

    @torch.no_grad()
    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        found = {}
        for stream in self.streams(opened):
            norms = norms_before(opened, prompt.inputs, stream)
            tokens = around_norms(opened, prompt, stream)["after"]
            angles = {
                site.layer: folded_angles(site, tokens[site.layer], norms[site.layer]).mean((0, 2))
                for site in opened.sites
                if site.stream == stream and site.layer in tokens
                if removes_mean(norms[site.layer], tokens[site.layer].shape[-1])
            }
            if angles:
                found[stream] = xr.Dataset({"angle": grid(angles)})
        if not found:
            raise HeadwiseError(f"uniform_query: no attention of {opened.name} reads the output of a LayerNorm.")
        return found

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {"uniform_query": values["angle"], "uniform_query_sem": values["angle_sem"]}


def folded_angles(
    site: Site, tokens: Float[Tensor, "batch token dim"], norm: nn.Module
) -> Float[Tensor, "batch head token"]:
    """Degrees between each query, seen from the normalised tokens, and the ones vector (or its opposite)."""
    width = tokens.shape[-1]
    q = torch.einsum("btm,hmc->bhtc", tokens, site.W_Q.float().cpu())
    if site.b_Q is not None:
        q = q + site.b_Q.float().cpu()[:, None]
    keys = site.W_K.float().cpu().repeat_interleave(site.group, 0)
    effective = torch.einsum("bhtc,hmc->bhtm", q, keys) * gain(norm, width).cpu()
    cosine = effective.sum(-1) / (effective.norm(dim=-1) * width**0.5).clamp(min=1e-30)
    return torch.rad2deg(torch.acos(cosine.abs().clamp(max=1)))
