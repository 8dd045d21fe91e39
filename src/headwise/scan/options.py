"""Which heads look at the letters of a multiple-choice question, and which at "yes" or "no"?

The survey's heads of answers, from the last token of "... A. dog B. red C. hammer D. France Answer:"

- constant heads look at all four letters alike: mass on the letters times their evenness, `H(a_A, ..., a_D) / log 4`;
- single-letter heads at one of them, whatever the question: the largest mean weight of one letter;
- correct-letter heads at the right one: its weight minus the mean of the other three.

Negative heads prefer the "no" of "Answer with yes or no": the negative attention score

    NAS = mean over prompts of sum_i (a[i, yes] + a[i, no]) log(a[i, no] / a[i, yes]), i the tokens after both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr

from headwise.attention.readings import At, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan import quiz
from headwise.scan.question import Column, Prompt, Question

SURVEY = Paper("Attention Heads of Large Language Models: A Survey", "2409.03752")
FLOOR = 1e-8
"""Added to the weights of "yes" and "no", so that the logarithm of none is finite."""


@dataclass(frozen=True)
class OptionHeads(Question):
    """`option_heads`: mean attention from the last token to the four letters together; `constant_heads`,
    `single_letter` and `correct_letter` as above."""

    prompts_asked: int = 16
    first_seed: int = 0
    paper: ClassVar[Paper] = SURVEY

    def __post_init__(self) -> None:
        if self.prompts_asked < 4 or self.prompts_asked % 4:
            raise HeadwiseError(
                f"OptionHeads(prompts_asked=...) must be a multiple of 4, so that each letter is right equally often; "
                f"got {self.prompts_asked!r}."
            )

    def columns(self) -> tuple[Column, ...]:
        rows = [
            ("option_heads", "Option letters", "Attention to the four letters.", "looks at the options"),
            ("constant_heads", "All letters alike", "The same, times how even it is.", "looks at all options alike"),
            ("single_letter", "One letter always", "The largest mean attention to one letter.", "prefers a letter"),
            (
                "correct_letter",
                "The right letter",
                "Attention to the right letter above the rest.",
                "knows the answer",
            ),
        ]
        asked = "On multiple-choice questions, from the last token:"
        return tuple(
            Column(name, title, f"{asked} {what[0].lower()}{what[1:]}", "share of attention", high)
            for name, title, what, high in rows
        )

    def lacks(self, opened: Opened) -> str | None:
        return quiz.lacks(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        return quiz.choices(opened, self.prompts_asked, self.first_seed)

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        return [looks(prompt, [prompt.own["places"][letter] for letter in quiz.LETTERS], last_only=True)]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        letters = values["at"].isel(sample=0, query=0, drop=True).rename(target="letter")
        mass = letters.sum("letter")
        share = letters / mass.where(mass > 0)
        evenness = -(share * np.log(share.where(share > 0, 1))).sum("letter") / np.log(len(quiz.LETTERS))
        right = letters.isel(letter=prompt.own["right"], drop=True)
        others = (mass - right) / (len(quiz.LETTERS) - 1)
        return xr.Dataset({"letters": letters, "mass": mass, "constant": mass * evenness, "correct": right - others})

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {"option_heads": "mass", "constant_heads": "constant", "correct_letter": "correct"}
        found = {column: values[name] for column, name in names.items()}
        found |= {f"{column}_sem": values[f"{name}_sem"] for column, name in names.items()}
        return found | {"single_letter": values["letters"].max("letter")}


@dataclass(frozen=True)
class NegativeHeads(Question):
    """`negative_heads`: the negative attention score; above 0 the head prefers "no", below 0 "yes". Half of the
    prompts name "no" first, so that places cancel."""

    prompts_asked: int = 16
    first_seed: int = 0
    paper: ClassVar[Paper] = SURVEY
    title: ClassVar[str] = "Negative heads"
    what: ClassVar[str] = 'On yes-or-no questions: how much more the tokens after "yes or no" look at the "no".'
    unit: ClassVar[str] = "attention times nats"
    higher: ClassVar[str] = 'looks at "no" more than at "yes"'

    def __post_init__(self) -> None:
        if self.prompts_asked < 4 or self.prompts_asked % 4:
            raise HeadwiseError(
                f"NegativeHeads(prompts_asked=...) must be a multiple of 4, to balance answer and order; got "
                f"{self.prompts_asked!r}."
            )

    def lacks(self, opened: Opened) -> str | None:
        return quiz.lacks(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        return quiz.yes_or_no(opened, self.prompts_asked, self.first_seed)

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        return [looks(prompt, [prompt.own["places"][word] for word in ("yes", "no")])]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        at = values["at"].isel(sample=0, drop=True)
        return xr.Dataset({"nas": nas(at.isel(target=0, drop=True), at.isel(target=1, drop=True))})

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {"negative_heads": values["nas"], "negative_heads_sem": values["nas_sem"]}


def nas(yes: xr.DataArray, no: xr.DataArray) -> xr.DataArray:
    """The negative attention score of weights with dim query."""
    return ((yes + no) * np.log((no + FLOOR) / (yes + FLOOR))).sum("query")


def looks(prompt: Prompt, keys: list[int], last_only: bool = False) -> At:
    """The weights of these keys, from the last token or from every one after them."""
    length = prompt.inputs["input_ids"].shape[1]
    queries = [length - 1] if last_only else list(range(max(keys) + 1, length))
    return At(targets=torch.tensor(keys).expand(length, -1), queries=queries, stream="text")
