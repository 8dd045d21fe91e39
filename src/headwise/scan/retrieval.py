"""Which heads copy the answer out of a long context?

A needle (an invented fact) is hidden in real text and asked for. While the model answers, token by token, a head hits
when the key it attends to most lies in the answer's span in the context and is the very token being generated. Score of
one kept instance: the share of the span's tokens the head has copied (count="set"), or hits over the span's length
(count="step"). Only instances the model answers well (ROUGE-1 recall above `rouge_min`) are kept; a head's score is the
mean over them.

`Scan.pattern("retrieval_heads")` is the file of scores to share. Beside the scores stand, over contexts (tokens) and
depths, the recall of the model and the score of every head, and how alike the heads' ranks are at two contexts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import xarray as xr

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needles import NEEDLES, Hidden, Needle, answer, haystack, hide, prefill
from headwise.scan.needs import lacks_language_model
from headwise.scan.question import Column, Prompt, Question


@dataclass(frozen=True)
class RetrievalHeads(Question):
    """`retrieval_heads`: the score, a retrieval head from the threshold on. `retrieval_active`: share of kept instances
    with a hit at all. `needles`, `contexts` (tokens) and `depths` (evenly spaced) make the instances. A hit may also be
    any of the `topk` most attended keys, with the first token left out (`exclude_first`: often a sink), and of the same
    text as the generated token, case and leading space aside, instead of the same id (`match="text"`).

    Profiles: `retrieval_recall` [context, depth], `retrieval_map` [layer, head, context, depth], and
    `retrieval_stability` [context, context_other], the Spearman correlation of all heads' scores."""

    needles: tuple[Needle, ...] = NEEDLES[:3]
    contexts: tuple[int, ...] = (256, 512)
    depths: int = 5
    span: Literal["answer", "needle"] = "answer"
    count: Literal["set", "step"] = "set"
    match: Literal["token", "text"] = "token"
    topk: int = 1
    exclude_first: bool = False
    rouge_min: float = 0.5
    kept_min: int = 10
    max_new: int = 16
    text: str | None = None
    threshold: float = 0.1  # type: ignore[misc]
    paper: ClassVar[Paper] = Paper("Retrieval Head Mechanistically Explains Long-Context Factuality", "2404.15574")
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = {"span": ("answer", "needle"), "count": ("set", "step"), "match": ("token", "text")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise HeadwiseError(
                    f"RetrievalHeads({name}=...) must be {' or '.join(map(repr, values))}; got {getattr(self, name)!r}."
                )
        if not self.needles or not self.contexts or self.depths < 1 or self.topk < 1:
            raise HeadwiseError("RetrievalHeads wants at least one needle, one context, one depth and topk=1.")

    def columns(self) -> tuple[Column, ...]:
        return (
            Column(
                "retrieval_heads",
                "Retrieval heads",
                "How much of a hidden answer the head copies: it looks most at the very token being generated.",
                "share of the answer",
                "fetches facts from the context",
                self.threshold,
            ),
            Column(
                "retrieval_active",
                "Retrieval, how often",
                "Share of answered questions in which the head copied at least one token of the answer.",
                "share of questions",
                "always at work",
            ),
        )

    def lacks(self, opened: Opened) -> str | None:
        if not getattr(opened.tokenizer, "is_fast", False):
            return lacks_language_model(opened) or "a fast tokenizer, to find the needle's tokens again"
        return lacks_language_model(opened)

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        return [Prompt({"input_ids": hidden.ids}, own=hidden) for hidden in self.instances(opened)]

    def instances(self, opened: Opened) -> Iterator[Hidden]:
        """Every needle in every context at every depth; contexts that the model has no positions for are an error."""
        text = self.text or haystack()
        room = max(self.contexts) + 100
        if opened.max_positions is not None and room > opened.max_positions:
            raise HeadwiseError(
                f"RetrievalHeads(contexts=...) asks for {max(self.contexts)} tokens and the question; the model has "
                f"{opened.max_positions} positions."
            )
        for context in self.contexts:
            for depth in np.linspace(0, 1, self.depths) if self.depths > 1 else [0.5]:
                for needle in self.needles:
                    yield hide(opened, needle, context, float(depth), text)

    def observe(self, opened: Opened, prompt: Prompt) -> dict[str, xr.Dataset]:
        hidden: Hidden = prompt.own
        wanted = self.topk + self.exclude_first
        found, produced, tops = answer(opened, hidden, prefill(opened, hidden), self.max_new, top=wanted)
        start, stop = hidden.answer if self.span == "answer" else hidden.sentence
        ids, said = hidden.ids[0].tolist(), np.repeat(produced, self.topk).tolist()
        if self.match == "text":
            ids, said = ([opened.decode([token]).strip().lower() for token in row] for row in (ids, said))
        places = highest(tops.values, self.topk, self.exclude_first)
        kept = found > self.rouge_min
        score = hits(places.reshape(*places.shape[:2], -1), said, ids, start, stop, self.count)
        score = score if kept else np.full_like(score, np.nan)
        seen = xr.DataArray(score, {"layer": tops["layer"], "head": tops["head"]}, ("layer", "head"))
        cell = {"context": [hidden.context], "depth": [hidden.depth]}
        data = {
            "hits": seen,
            "active": (seen > 0).where(seen.notnull()),
            "kept": xr.DataArray(float(kept)),
            "map": seen.expand_dims(cell),
            "recall": xr.DataArray(found).expand_dims(cell),
        }
        return {"text": xr.Dataset(data)}

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        kept, asked = int(values["hits_count"].max()), int(values["kept_count"])
        if kept < self.kept_min:
            raise HeadwiseError(
                f"RetrievalHeads: the model answered {kept} of {asked} questions, fewer than kept_min={self.kept_min}: "
                "use easier needles, shorter contexts or a stronger model."
            )
        return {
            "retrieval_heads": values["hits"],
            "retrieval_heads_sem": values["hits_sem"],
            "retrieval_active": values["active"],
            "retrieval_active_sem": values["active_sem"],
        }

    def profiles(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        cells = values["map"].transpose("layer", "head", "context", "depth")
        return {
            "retrieval_recall": values["recall"].transpose("context", "depth"),
            "retrieval_map": cells,
            "retrieval_stability": stability(cells.mean("depth")),
        }


def stability(scores: xr.DataArray) -> xr.DataArray:
    """Spearman correlation of the scores of all heads [layer, head, context] between contexts (ties share their mean
    rank); nan where a context kept no instance."""
    table = scores.stack(place=("layer", "head")).transpose("place", "context").to_pandas()
    ranks = table.rank().corr().to_numpy()
    context = scores["context"].values
    return xr.DataArray(ranks, {"context": context, "context_other": context}, ("context", "context_other"))


def highest(places: np.ndarray, k: int, exclude_first: bool) -> np.ndarray:
    """The first k of the most attended keys [layer, head, step, rank], key 0 passed over where it is excluded."""
    if exclude_first:
        places = np.take_along_axis(places, np.argsort(places == 0, axis=-1, kind="stable"), -1)
    return places[..., :k]


def hits(top: np.ndarray, produced: Sequence, ids: Sequence, start: int, stop: int, count: str) -> np.ndarray:
    """Score [layer, head] of one instance from the most attended key [layer, head, step] of every decoding step; the
    tokens `produced` at each step and those of the context are ids or texts."""
    copied = np.zeros((*top.shape[:2], stop - start))
    context = np.asarray(ids)
    for step, token in enumerate(produced):
        place = top[..., step]
        inside = (place >= start) & (place < stop)
        same = inside & (context[np.where(inside, place, start)] == token)
        layer, head = same.nonzero()
        copied[layer, head, place[same] - start] += 1
    if count == "set":
        copied = copied > 0
    return copied.sum(-1) / (stop - start)
