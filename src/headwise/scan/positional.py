"""Which heads attend by position rather than by content?

Mean mass on the token itself, the one before, the one after, a window of w tokens to each side, the first token, and
separators (special tokens after the first, punctuation, line breaks). Thresholds for one-token patterns and separators
follow the paper (0.5 and 0.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from headwise.attention.readings import Mass, Propagate, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import lacks_token_order, ordered_streams
from headwise.scan.question import Column, Prompt, Question

STEPS = ("self", "previous", "next")
SEPARATORS = frozenset(".,;:!?")


@dataclass(frozen=True)
class PositionalHeads(Question):
    """`positional_heads` is the largest of self, previous and next; each pattern has a column of its own. `separator`
    is read where the input is one sequence of token ids with a tokenizer."""

    window: int = 8
    threshold: float = 0.5  # type: ignore[misc]
    paper: ClassVar[Paper] = Paper("What Does BERT Look At? An Analysis of BERT's Attention", "1906.04341")

    def __post_init__(self) -> None:
        if self.window < 1:
            raise HeadwiseError(f"PositionalHeads(window=...) must be at least 1 token; got {self.window!r}.")

    def columns(self) -> tuple[Column, ...]:
        unit, high = "share of attention", self.threshold
        rows = [
            (
                "positional_heads",
                "Fixed-step heads",
                "The largest of attention to self, previous and next token.",
                "attends by position",
                high,
            ),
            ("self", "Self", "Mean attention to the token itself.", "looks at itself", high),
            ("previous", "Previous token", "Mean attention to the token before.", "looks one back", high),
            ("next", "Next token", "Mean attention to the token after.", "looks one ahead", high),
            ("local", "Local window", f"Mean attention to tokens at most {self.window} away.", "stays near", None),
            ("first", "First token", "Mean attention to the token at position 0.", "looks at the start", None),
            (
                "separator",
                "Separators",
                "Mean attention to punctuation, line breaks and special tokens after the first.",
                "looks at separators",
                0.6,
            ),
        ]
        return tuple(Column(name, title, what, unit, higher, mark) for name, title, what, higher, mark in rows)

    def lacks(self, opened: Opened) -> str | None:
        return lacks_token_order(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ordered_streams(opened)

    def readings(self, opened: Opened) -> list[Reading]:
        return [Mass((*STEPS, "first", f"window:{self.window}"), per="head")]

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        marks = separators(opened, prompt.inputs)
        if marks is None:
            return self.readings(opened)
        return [*self.readings(opened), Propagate(marks[:, None], per="head", stream="text", name="separator")]

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        mass, sem = values["mass"], values["mass_sem"]
        renamed = {name: name for name in (*STEPS, "first")} | {"local": f"window:{self.window}"}
        columns = {column: mass.sel(segment=name, drop=True) for column, name in renamed.items()}
        columns |= {f"{column}_sem": sem.sel(segment=name, drop=True) for column, name in renamed.items()}
        if "separator" in values:
            columns["separator"] = values["separator"].isel(column=0, drop=True)
            columns["separator_sem"] = values["separator_sem"].isel(column=0, drop=True)
        steps = mass.sel(segment=list(STEPS))
        best = steps.fillna(-1.0).argmax("segment")
        columns["positional_heads"] = steps.isel(segment=best).drop_vars("segment")
        columns["positional_heads_sem"] = sem.sel(segment=list(STEPS)).isel(segment=best).drop_vars("segment")
        return columns


def separators(opened: Opened, inputs: Mapping[str, Any]) -> Float[Tensor, " token"] | None:
    """1 for tokens that separate, 0 for others; None where the input is not one sequence of known tokens."""
    ids = inputs.get("input_ids")
    tokenizer = opened.tokenizer
    if tokenizer is None or not isinstance(ids, Tensor) or ids.shape[0] != 1:
        return None
    if not any(site.stream == "text" and site.kind == "self" for site in opened.sites):
        return None
    special = set(tokenizer.all_special_ids)
    marks = torch.zeros(ids.shape[1], device=ids.device)
    for place, token in enumerate(ids[0].tolist()):
        text = tokenizer.decode([token])
        punctuation = bool(text.strip()) and set(text.strip()) <= SEPARATORS
        if punctuation or (token in special and place > 0) or "\n" in text:
            marks[place] = 1.0
    return marks
