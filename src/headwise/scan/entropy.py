"""How spread out is each head's attention? `H_i = -sum_j a_ij log a_ij`, averaged over queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import xarray as xr

from headwise.attention.readings import Entropy as EntropyReading
from headwise.attention.readings import Reading
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Question


@dataclass(frozen=True)
class Entropy(Question):
    """Mean entropy of a head's rows in nats: 0 looks at one token, log n at all n alike."""

    paper: ClassVar[Paper] = Paper("What Does BERT Look At? An Analysis of BERT's Attention", "1906.04341")
    title: ClassVar[str] = "Entropy"
    what: ClassVar[str] = "How evenly the attention is spread over the visible tokens."
    unit: ClassVar[str] = "nats"
    higher: ClassVar[str] = "looks at many tokens alike"

    def readings(self, opened: Opened) -> list[Reading]:
        return [EntropyReading(per="head")]

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {"entropy": values["entropy"], "entropy_sem": values["entropy_sem"]}
