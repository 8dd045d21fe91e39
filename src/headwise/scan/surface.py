"""Surface patterns of an encoder: attention to [CLS], to [SEP], and to full stops and commas (Clark et al., 2019).

Per head, the mean over rows of the attention to all tokens of a kind; to [SEP] also from the [SEP]s and from all other
tokens alone; and the entropy (nats) of the row of [CLS]. Attention to the token itself, the next and the one before are
in `PositionalHeads`, the entropy of all rows in `Entropy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import xarray as xr

from headwise.attention.readings import Entropy, Propagate, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question

KINDS = ("cls", "sep", "punctuation")


@dataclass(frozen=True)
class SurfacePatterns(Question):
    """`surface_patterns` is the largest of `cls`, `sep` and `punctuation`."""

    threshold: float = 0.6  # type: ignore[misc]
    paper: ClassVar[Paper] = Paper("What Does BERT Look At? An Analysis of BERT's Attention", "1906.04341")

    def columns(self) -> tuple[Column, ...]:
        share, high = "share of attention", self.threshold
        return (
            Column("surface_patterns", "Surface patterns", "The largest of the next three.", share, "rests", high),
            Column("cls", "[CLS]", "Mean attention to [CLS].", share, "looks at [CLS]", high),
            Column("sep", "[SEP]", "Mean attention to all [SEP]s.", share, "looks at [SEP]", high),
            Column("punctuation", "Full stops", "Mean attention to full stops and commas.", share, "looks there", high),
            Column(
                "sep_to_sep", "[SEP] to [SEP]", "Mean attention from [SEP] to all [SEP]s.", share, "stays there", None
            ),
            Column(
                "other_to_sep", "Others to [SEP]", "Mean attention from other tokens to [SEP].", share, "rests", None
            ),
            Column("cls_entropy", "[CLS]'s entropy", "Entropy of the row of [CLS].", "nats", "gathers", None),
        )

    def lacks(self, opened: Opened) -> str | None:
        ids = [getattr(opened.tokenizer, f"{kind}_token_id", None) for kind in ("cls", "sep")]
        return None if None not in ids and "text" in opened.streams else "a text encoder with [CLS] and [SEP]"

    def streams(self, opened: Opened) -> Sequence[str]:
        return ("text",)

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        ids = prompt.inputs.get("input_ids")
        if ids is None or len(ids) != 1:
            raise HeadwiseError("SurfacePatterns wants inputs of one text each.")
        tokenizer = opened.tokenizer
        stops = [n for n in tokenizer.convert_tokens_to_ids([".", ","]) if n != tokenizer.unk_token_id]
        kinds = ([tokenizer.cls_token_id], [tokenizer.sep_token_id], stops)
        marks = [torch.isin(ids[0], ids.new_tensor(kind)) for kind in kinds]
        first, last, others = (m.nonzero().flatten().tolist() for m in (marks[0], marks[1], ~marks[1]))
        if not first or not last:
            raise HeadwiseError("SurfacePatterns wants texts with [CLS] and [SEP], as the tokenizer adds them.")
        to = [mark[:, None].float() for mark in marks]
        return [
            *(Propagate(x, per="head", stream="text", name=kind) for x, kind in zip(to, KINDS, strict=True)),
            Propagate(to[1], per="head", stream="text", name="sep_to_sep", queries=last),
            Propagate(to[1], per="head", stream="text", name="other_to_sep", queries=others),
            Entropy(per="head", stream="text", name="cls_entropy", queries=first),
        ]

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = (*KINDS, "sep_to_sep", "other_to_sep")
        columns = {n + end: values[n + end].isel(column=0, drop=True) for n in names for end in ("", "_sem")}
        columns |= {name: values[name] for name in ("cls_entropy", "cls_entropy_sem")}
        largest = xr.concat([columns[kind] for kind in KINDS], "kind").max("kind")
        return columns | {"surface_patterns": largest}
