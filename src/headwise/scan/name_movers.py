"""Which heads say who gets the gift? ("When Mary and John went to the store, John gave a drink to" Mary.)

From the last token, name movers look at the name that came once (the receiver), S-inhibition heads at the second
mention of the giver; from there, duplicate-token heads look at the first mention. The receiver's weight is taken above
that of the giver's first mention, which stands beside it: half of the prompts name the giver first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import xarray as xr

from headwise.attention.readings import At, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan import quiz
from headwise.scan.question import Column, Prompt, Question


@dataclass(frozen=True)
class NameMovers(Question):
    """`name_movers`: a[end, receiver] - a[end, giver's first mention]. `s_inhibition`: a[end, giver's second mention].
    `duplicate_name`: a[second mention, first mention]. A name of several tokens counts at its last."""

    prompts_asked: int = 16
    first_seed: int = 0
    paper: ClassVar[Paper] = Paper(
        "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small", "2211.00593"
    )

    def __post_init__(self) -> None:
        if self.prompts_asked < 2 or self.prompts_asked % 2:
            raise HeadwiseError(
                f"NameMovers(prompts_asked=...) must be even, to name the giver first in half of them; got "
                f"{self.prompts_asked!r}."
            )

    def columns(self) -> tuple[Column, ...]:
        rows = [
            ("name_movers", "Name movers", "from the end, attention to the receiver's name above the giver's",
             "looks at the name to say"),
            ("s_inhibition", "Subject inhibition", "from the end, attention to the giver's second mention",
             "looks at the name not to say"),
            ("duplicate_name", "Repeated names", "from the giver's second mention, attention to the first",
             "looks for the same name"),
        ]  # fmt: skip
        return tuple(
            Column(name, title, f"In sentences about a gift: {what}.", "share of attention", high)
            for name, title, what, high in rows
        )

    def lacks(self, opened: Opened) -> str | None:
        return quiz.lacks(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        return quiz.gifts(opened, self.prompts_asked, self.first_seed)

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        at = prompt.own["places"]
        targets = torch.full((prompt.inputs["input_ids"].shape[1], 3), -1)
        targets[at["end"]] = torch.tensor([at["io"], at["s1"], at["s2"]])
        targets[at["s2"], 0] = at["s1"]
        return [At(targets=targets, queries=[at["s2"], at["end"]], stream="text")]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        second, end = (values["at"].isel(sample=0, query=n, drop=True) for n in (0, 1))
        receiver, first, again = (end.isel(target=n, drop=True) for n in range(3))
        return xr.Dataset(
            {"mover": receiver - first, "inhibition": again, "duplicate": second.isel(target=0, drop=True)}
        )

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {"name_movers": "mover", "s_inhibition": "inhibition", "duplicate_name": "duplicate"}
        found = {column: values[name] for column, name in names.items()}
        return found | {f"{column}_sem": values[f"{name}_sem"] for column, name in names.items()}
