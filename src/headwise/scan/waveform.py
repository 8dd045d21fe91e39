"""At which distances does a rotary model attend less, whatever the content?

The bound on the score that can be attained at a distance, the waveform, falls in ripples that depend on the rotary base
(attention/waveform.py). `WaveformHeads` measures whether a head's attention to random tokens has the ripples of the
model's own waveform.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from headwise.attention.readings import At, Reading
from headwise.attention.rope import find_rotary
from headwise.attention.waveform import Frequencies, ripples, rope_frequencies, rope_waveform
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import lacks_language_model
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.tokens import beginning, random_tokens

FLAT = 1e-6
"""A curve that varies by less, as a share of its largest value, has no ripples but those of rounding."""


def model_frequencies(opened: Opened) -> Frequencies | None:
    """The frequencies the model's text layers turn by, scaling included; None where they are not rotary."""
    site = next((site for site in opened.sites if site.stream == "text"), None)
    rotary = None if site is None else find_rotary(opened.model, site.module)
    return None if rotary is None else rotary.inv_freq.detach().double().cpu().numpy()


@dataclass(frozen=True)
class WaveformHeads(Question):
    """`waveform_heads`: rank correlation, over distances 1 ... span, of a head's mean attention with the waveform, both
    without their trends. Profiles over dim distance: `attention_by_distance` and `rope_waveform`. The queries are those
    with at least `span` tokens before them in random text. `base` replaces the model's own frequencies, for a model
    that runs with another base (`Rebase`)."""

    span: int = 256
    seeds: int = 2
    every: int = 4
    base: float | None = None
    first_seed: int = 0
    paper: ClassVar[Paper] = Paper(
        "Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for Effective "
        "Tool Use",
        "2312.04455",
    )

    def __post_init__(self) -> None:
        if self.span < 16 or self.seeds < 1 or self.every < 1:
            raise HeadwiseError(
                "WaveformHeads wants span of at least 16 tokens, seeds and every of at least 1; got "
                f"span={self.span}, seeds={self.seeds}, every={self.every}."
            )

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "waveform_heads",
                "Follows the rotary waveform",
                "On random tokens: how alike the ripples of attention over distance and of the waveform are.",
                "rank correlation",
                "its distances are favoured as the rotation favours them",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        found = lacks_language_model(opened)
        return found or (None if model_frequencies(opened) is not None else "rotary positions headwise can read")

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        start = beginning(opened)
        front = [] if start is None else [torch.tensor([[start]])]
        total = 2 * self.span + len(front)
        if opened.max_positions is not None and total > opened.max_positions:
            raise HeadwiseError(
                f"WaveformHeads(span={self.span}) reads {total} tokens, more than the model's {opened.max_positions} "
                "positions: lower span=."
            )
        width = next(site.head_dim for site in opened.sites if site.stream == "text")
        used = model_frequencies(opened) if self.base is None else rope_frequencies(self.base, width)
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [
            Prompt(
                {"input_ids": torch.cat([*front, random_tokens(opened, 1, 2 * self.span, seed)], 1).to(opened.device)},
                own=used,
            )
            for seed in seeds
        ]

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        last = prompt.inputs["input_ids"].shape[1]
        # From span + 1 on, so that no query reaches the first token, which is a sink in most models.
        queries = range(last - self.span + 1, last, self.every)
        return [At(lags=range(1, self.span + 1), queries=queries, per="head", stream="text")]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        wave = rope_waveform(prompt.own, self.span)[1:]
        return values.assign(waveform=xr.DataArray(wave, {"lag": values["lag"]}, ("lag",)))

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        seen = values["at"].transpose("layer", "head", "lag")
        flat = ripples(seen.values)
        wave = ripples(values["waveform"].values)
        found = rank_correlation(flat, wave)
        return {
            "waveform_heads": xr.DataArray(found, {"layer": seen["layer"], "head": seen["head"]}, ("layer", "head"))
        }

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {"attention_by_distance": values["at"], "rope_waveform": values["waveform"]}


def rank_correlation(many: Float[np.ndarray, "... place"], one: Float[np.ndarray, " place"]) -> np.ndarray:
    """Spearman's correlation of every row with one curve (values without ties); nan for a row that is flat."""
    rank = many.argsort(-1).argsort(-1).astype(float)
    other = one.argsort().argsort().astype(float)
    rank, other = rank - rank.mean(-1, keepdims=True), other - other.mean()
    found = (rank @ other) / np.sqrt((rank**2).sum(-1) * (other**2).sum())
    return np.where(np.ptp(many, axis=-1) > FLAT * np.abs(many).max(-1), found, np.nan)
