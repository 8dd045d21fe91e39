"""Which heads copy the answer out of a long context?

A needle (an invented fact) is hidden in real text and asked for. While the model answers, token by token, a head hits
when the key it attends to most lies in the answer's span in the context and is the very token being generated. Score of
one kept instance: the share of the span's tokens the head has copied (count="set"), or hits over the span's length
(count="step"). Only instances the model answers well (ROUGE-1 recall above `rouge_min`) are kept; a head's score is the
mean over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr

from headwise.attention import Edit, attend
from headwise.attention.readings import Top
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needles import NEEDLES, Hidden, Needle, haystack, hide, recall
from headwise.scan.needs import accepts, lacks_language_model
from headwise.scan.question import Column, Prompt, Question


@dataclass(frozen=True)
class RetrievalHeads(Question):
    """`retrieval_heads`: the score, a retrieval head from the threshold on. `retrieval_active`: share of kept instances
    with a hit at all. `needles`, `contexts` (tokens) and `depths` (evenly spaced) make the instances."""

    needles: tuple[Needle, ...] = NEEDLES[:3]
    contexts: tuple[int, ...] = (256, 512)
    depths: int = 5
    span: Literal["answer", "needle"] = "answer"
    count: Literal["set", "step"] = "set"
    rouge_min: float = 0.5
    kept_min: int = 10
    max_new: int = 16
    text: str | None = None
    threshold: float = 0.1  # type: ignore[misc]
    paper: ClassVar[Paper] = Paper("Retrieval Head Mechanistically Explains Long-Context Factuality", "2404.15574")
    drives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.span not in ("answer", "needle") or self.count not in ("set", "step"):
            raise HeadwiseError(
                f'RetrievalHeads: span "answer" or "needle", count "set" or "step"; got {self.span!r}, {self.count!r}.'
            )
        if not self.needles or not self.contexts or self.depths < 1:
            raise HeadwiseError("RetrievalHeads wants at least one needle, one context and one depth.")

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
        found, produced, tops = answer(opened, hidden, prefill(opened, hidden), self.max_new)
        kept = found > self.rouge_min
        start, stop = hidden.answer if self.span == "answer" else hidden.sentence
        score = hits(tops.values, produced, hidden.ids[0].tolist(), start, stop, self.count)
        place = {"layer": tops["layer"], "head": tops["head"]}
        score = score if kept else np.full_like(score, np.nan)
        active = np.where(np.isnan(score), np.nan, score > 0)
        data = {name: xr.DataArray(x, place, ("layer", "head")) for name, x in (("hits", score), ("active", active))}
        return {"text": xr.Dataset(data | {"kept": xr.DataArray(float(kept))})}

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


def hits(top: np.ndarray, produced: Sequence[int], ids: Sequence[int], start: int, stop: int, count: str) -> np.ndarray:
    """Score [layer, head] of one instance from the most attended key [layer, head, step] of every decoding step."""
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


@torch.no_grad()
def prefill(opened: Opened, hidden: Hidden) -> Any:
    """The cache after a plain forward of all tokens but the last."""
    keep = {"logits_to_keep": 1} if accepts(opened.model, "logits_to_keep") else {}
    return opened.model(input_ids=hidden.ids[:, :-1], use_cache=True, **keep).past_key_values


@torch.no_grad()
def answer(
    opened: Opened, hidden: Hidden, state: Any, max_new: int, edits: Sequence[Edit] = ()
) -> tuple[float, list[int], xr.DataArray]:
    """Greedy decoding from a prefilled cache (it grows) until the answer is complete, a line ends or `max_new` tokens
    are there: ROUGE-1 recall, the tokens, and the most attended key of every step as [layer, head, step]. The query of
    step t is the token before the t-th generated one. `edits` act while decoding only."""
    model, tokenizer, ids = opened.model, opened.tokenizer, hidden.ids
    produced: list[int] = []
    found = 0.0
    step = ids[:, -1:]
    with attend(opened, readings=[Top(1, stream="text")], edits=edits) as run:
        while len(produced) < max_new and found < 1:
            seen = model(input_ids=step, past_key_values=state, use_cache=True)
            state, token = seen.past_key_values, int(seen.logits[0, -1].argmax())
            produced.append(token)
            said = tokenizer.decode(produced, skip_special_tokens=True)
            found = recall(said, hidden.needle.answer)
            if token in tokenizer.all_special_ids or "\n" in said.lstrip():
                break
            step = torch.tensor([[token]], device=ids.device)
    tops = run.tree["text"]["top_index"].isel(sample=0, rank=0).transpose("layer", "head", "query")
    return found, produced, tops.rename(query="step")
