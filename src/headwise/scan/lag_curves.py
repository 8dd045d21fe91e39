"""Which heads recall like people do: next to what they saw before, and forwards more than backwards?

A list s of N different random tokens is read twice (BOS in front where the tokenizer has one). For the query at place i
of the second copy, the key at place j of the first copy has lag j - i: 0 is the same token, +1 the one that followed
it. The lag curve of a head is its mean score (before the softmax) at every lag, over queries and lists; lags that leave
the list are left out. `cmr_distance` is how far the curve, at lags -5 to 5, is from the nearest free-recall curve of
the CMR model (`headwise.scan.cmr`): 0 is a perfect fit, 1 as bad as a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr

from headwise.attention.readings import At, Reading, Scores
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.cmr import PARAMETERS, cmr_fit
from headwise.scan.needs import lacks_language_model
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.tokens import beginning, random_tokens


@dataclass(frozen=True)
class CmrDistance(Question):
    """Columns: `cmr_distance` (below 0.5 "CMR-like"), `recall_asymmetry` (score at lag +1 minus lag -1) and
    `recall_next` (attention at lag +1, the induction score). Profiles over dim lag: `lag_curve`, `lag_curve_sem`,
    `lag_weight` (the same of weights); `cmr_parameters` of the nearest model. How many tokens a list has, and whether a
    BOS comes first, is not settled by the paper: 100, and yes."""

    length: int = 100
    seeds: int = 4
    max_lag: int = 8
    fit_lag: int = 5
    threshold: float = 0.5  # type: ignore[misc]
    first_seed: int = 0
    paper: ClassVar[Paper] = Paper("Linking In-context Learning in Transformers to Human Episodic Memory", "2405.14992")

    def __post_init__(self) -> None:
        if self.seeds < 1 or not 1 <= self.fit_lag <= self.max_lag < self.length or self.fit_lag > 8:
            raise HeadwiseError(
                "CmrDistance wants seeds of at least 1 and 1 <= fit_lag <= max_lag < length, fit_lag at most 8; got "
                f"seeds={self.seeds}, fit_lag={self.fit_lag}, max_lag={self.max_lag}, length={self.length}."
            )

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "cmr_distance",
                "CMR distance",
                "On a list read twice: how far the scores around the earlier copy are from human free recall.",
                "share of variance",
                "unlike free recall",
                self.threshold,
            ),
            Column(
                "recall_asymmetry",
                "Forward asymmetry",
                "On a list read twice: score of what came after the earlier copy, minus what came before it.",
                "score",
                "recalls forwards",
            ),
            Column(
                "recall_next",
                "Attention to what came next",
                "On a list read twice: mean attention to the token after the earlier copy.",
                "share of attention",
                "looks for what came next last time",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        return lacks_language_model(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        start = beginning(opened)
        front = torch.zeros(1, 0, dtype=torch.long) if start is None else torch.tensor([[start]])
        total = 2 * self.length + front.shape[1]
        if opened.max_positions is not None and total > opened.max_positions:
            raise HeadwiseError(
                f"CmrDistance(length={self.length}) reads {total} tokens, more than the model's "
                f"{opened.max_positions} positions: lower length=."
            )
        lists = [random_tokens(opened, 1, self.length, self.first_seed + n) for n in range(self.seeds)]
        return [Prompt({"input_ids": torch.cat([front, s, s], 1).to(opened.device)}) for s in lists]

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        total = prompt.inputs["input_ids"].shape[1]
        skip = total - 2 * self.length
        place = torch.arange(self.length)[:, None] + self.lags
        inside = (place >= 0) & (place < self.length)
        targets = torch.full((total, len(self.lags)), -1)
        targets[skip + self.length :] = torch.where(inside, place + skip, -1)
        second = range(skip + self.length, total)
        return [reading(targets=targets, queries=second, stream="text") for reading in (Scores, At)]

    @property
    def lags(self) -> torch.Tensor:
        return torch.arange(-self.max_lag, self.max_lag + 1)

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        """Mean, standard error and number of queries of each lag; a weight where there is no key is left out, not 0."""
        found = {}
        there = values["scores"].notnull()
        for name in ("scores", "at"):
            x = values[name].where(there)
            count = there.sum(["sample", "query"])
            spread = x.std(["sample", "query"], ddof=1)
            found |= {name: x.mean(["sample", "query"]), f"{name}_count": count, f"{name}_sem": spread / np.sqrt(count)}
        return xr.Dataset(found).rename(target="lag").assign_coords(lag=self.lags.numpy())

    def near(self, values: xr.Dataset) -> np.ndarray:
        """The curves at the lags of the fit, as [layer, head, lag]."""
        curve = values["scores"].sel(lag=slice(-self.fit_lag, self.fit_lag))
        return curve.transpose("layer", "head", "lag").values

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        curve, error = values["scores"], values["scores_sem"]
        place = {"layer": values["layer"], "head": values["head"]}
        spread = np.hypot(error.sel(lag=1, drop=True), error.sel(lag=-1, drop=True))
        return {
            "cmr_distance": xr.DataArray(cmr_fit(self.near(values)).distance, place, ("layer", "head")),
            "recall_asymmetry": curve.sel(lag=1, drop=True) - curve.sel(lag=-1, drop=True),
            "recall_asymmetry_sem": spread,
            "recall_next": values["at"].sel(lag=1, drop=True),
            "recall_next_sem": values["at_sem"].sel(lag=1, drop=True),
        }

    def profiles(self, values: xr.Dataset) -> Mapping[str, xr.DataArray]:
        place = {"layer": values["layer"], "head": values["head"], "parameter": list(PARAMETERS)}
        fitted = cmr_fit(self.near(values)).parameters
        return {
            "lag_curve": values["scores"],
            "lag_curve_sem": values["scores_sem"],
            "lag_weight": values["at"],
            "cmr_parameters": xr.DataArray(fitted, place, ("layer", "head", "parameter")),
        }
