"""How far does each head look? `d_i = sum_j a_ij |i - j|`, averaged over queries, and the spread around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from headwise.attention.readings import Distance as DistanceReading
from headwise.attention.readings import Reading
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import lacks_token_order, ordered_streams
from headwise.scan.question import Column, Question


@dataclass(frozen=True)
class Distance(Question):
    """`distance`: mean |i - j| in tokens. `distance_spread`: standard deviation of |i - j| under the attention."""

    paper: ClassVar[Paper] = Paper("Analyzing the Structure of Attention in a Transformer Language Model", "1906.04284")

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "distance",
                "Distance",
                "Mean number of tokens between a token and what it looks at.",
                "tokens",
                "looks far",
            ),
            Column(
                "distance_spread",
                "Spread of the distance",
                "How much that distance varies, over tokens and within a token's attention.",
                "tokens",
                "looks both near and far",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        return lacks_token_order(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ordered_streams(opened)

    def readings(self, opened: Opened) -> list[Reading]:
        return [DistanceReading(per="head")]

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        mean = values["distance"]
        spread = np.sqrt((values["distance_sq"] - mean**2).clip(min=0))
        return {"distance": mean, "distance_sem": values["distance_sem"], "distance_spread": spread}
