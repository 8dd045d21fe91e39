"""Which heads complete [A][B] ... [A] -> [B]?

Prefix matching: R random tokens are repeated (BOS in front where the tokenizer has one). A query at place p of the
second or a later copy shows token x; its score is the attention to every place right after an earlier x, `sum_{j < p,
x_j = x} a_{p, j+1}`, averaged over queries, sequences and seeds. The duplicate-token score takes the earlier places of
x themselves, `sum_j a_{p, j}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from headwise.attention.readings import At, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import lacks_language_model
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.tokens import beginning, random_tokens


@dataclass(frozen=True)
class InductionHeads(Question):
    """`induction_heads`: prefix matching, the standard error taken over seeds. `duplicate_token`: earlier copies
    themselves."""

    seeds: int = 3
    length: int = 25
    repeats: int = 4
    sequences: int = 4
    threshold: float = 0.4  # type: ignore[misc]
    first_seed: int = 0
    paper: ClassVar[Paper] = Paper("In-context Learning and Induction Heads", "2209.11895")

    def __post_init__(self) -> None:
        least = {"seeds": 1, "length": 2, "repeats": 2, "sequences": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise HeadwiseError(
                    f"InductionHeads({name}=...) must be at least {value}; got {getattr(self, name)!r}."
                )

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "induction_heads",
                "Induction heads",
                "On repeated random tokens: attention to what followed earlier copies of the current token.",
                "share of attention",
                "looks for what came next last time",
                self.threshold,
            ),
            Column(
                "duplicate_token",
                "Duplicate tokens",
                "On repeated random tokens: attention to earlier copies of the current token.",
                "share of attention",
                "looks for the same token",
                self.threshold,
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        return lacks_language_model(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        start = beginning(opened)
        total = self.length * self.repeats + (start is not None)
        if opened.max_positions is not None and total > opened.max_positions:
            raise HeadwiseError(
                f"InductionHeads reads {total} tokens, more than the model's {opened.max_positions} positions: "
                "lower length= or repeats=."
            )
        return [
            Prompt({"input_ids": repeated(opened, self, seed).to(opened.device)})
            for seed in range(self.first_seed, self.first_seed + self.seeds)
        ]

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        ids = prompt.inputs["input_ids"].cpu()
        matches = earlier_places(ids[0], start=ids.shape[1] - self.length * self.repeats)
        queries = (matches >= 0).any(-1).nonzero().flatten().tolist()
        after = torch.where(matches >= 0, matches + 1, -1)
        targets = torch.cat([after, matches], dim=-1)
        return [At(targets=targets, queries=queries, stream="text")]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        mean = values["at"].mean(["sample", "query"])
        half = mean.sizes["target"] // 2
        return xr.Dataset(
            {
                "prefix": mean.isel(target=slice(None, half)).sum("target"),
                "duplicate": mean.isel(target=slice(half, None)).sum("target"),
            }
        )

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {
            "induction_heads": values["prefix"],
            "induction_heads_sem": values["prefix_sem"],
            "duplicate_token": values["duplicate"],
            "duplicate_token_sem": values["duplicate_sem"],
        }


def repeated(opened: Opened, question: InductionHeads, seed: int) -> Int[Tensor, "sequence token"]:
    """BOS (where there is one) and `repeats` copies of `length` random tokens, for each of the `sequences`."""
    ids = random_tokens(opened, question.sequences, question.length, seed).repeat(1, question.repeats)
    start = beginning(opened)
    return ids if start is None else torch.cat([torch.full((len(ids), 1), start), ids], dim=1)


def earlier_places(ids: Int[Tensor, " token"], start: int = 0) -> Int[Tensor, "token copy"]:
    """For every place the earlier places (from `start` on) that hold the same token, padded with -1."""
    seen: dict[int, list[int]] = {}
    rows: list[list[int]] = []
    for place, token in enumerate(ids.tolist()):
        rows.append(list(seen.get(token, [])) if place >= start else [])
        if place >= start:
            seen.setdefault(token, []).append(place)
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])
