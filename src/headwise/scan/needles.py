"""Needles in a haystack: an invented fact hidden in real text, a question only the text can answer, and the answer a
model gives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from headwise.attention import Edit, attend
from headwise.attention.readings import Top
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.needs import accepts


@dataclass(frozen=True)
class Needle:
    """`text` states the fact, `answer` is the part of it that answers `question`."""

    text: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.text:
            raise HeadwiseError(
                f"Needle(answer=...) must be a part of its text; got {self.answer!r} for {self.text!r}."
            )


NEEDLES = (
    Needle("The secret word of Velmora is copper violin.", "What is the secret word of Velmora?", "copper violin"),
    Needle(
        "The favourite food of Doctor Quillan is pumpkin soup.",
        "What is the favourite food of Doctor Quillan?",
        "pumpkin soup",
    ),
    Needle(
        "The ship of Captain Brask is called Silver Lantern.",
        "What is the ship of Captain Brask called?",
        "Silver Lantern",
    ),
    Needle(
        "The winner of the Tarnholm race was a green tortoise.",
        "Who was the winner of the Tarnholm race?",
        "a green tortoise",
    ),
    Needle(
        "The password of the Orvik library is winter thunder.",
        "What is the password of the Orvik library?",
        "winter thunder",
    ),
    Needle(
        "The hidden treasure of Maddox Hill is a glass piano.",
        "What is the hidden treasure of Maddox Hill?",
        "a glass piano",
    ),
)
"""Names and facts are made up, so that no model can know them."""


@dataclass(frozen=True)
class Hidden:
    """One needle in one haystack, as the model reads it."""

    needle: Needle
    context: int
    depth: float
    ids: Int[Tensor, "1 token"]
    answer: tuple[int, int]
    """Where the answer's tokens are."""
    sentence: tuple[int, int]
    """Where the needle's tokens are."""


@cache
def haystack() -> str:
    """The English prose the package carries."""
    return (files("headwise.scan") / "assets" / "prose.txt").read_text(encoding="utf-8")


def hide(opened: Opened, needle: Needle, context: int, depth: float, text: str) -> Hidden:
    """The needle put at `depth` (0 = start, 1 = end) of about `context` tokens of `text`, moved back to a sentence end;
    the question follows, in the chat template where the tokenizer has one."""
    tokenizer = opened.tokenizer
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ends = encoded["offset_mapping"]
    room = context - len(tokenizer(needle.text, add_special_tokens=False)["input_ids"])
    if room < 1 or len(ends) < room:
        raise HeadwiseError(
            f"A haystack of {context} tokens cannot be cut from a text of {len(ends)} tokens: use another context."
        )
    stop = ends[room - 1][1]
    wished = ends[int(depth * (room - 1))][1]
    sentences = [0, *(m.end() for m in re.finditer(r'[.!?]["\u201d]?\s+', text[:stop]))]
    cut = max(place for place in sentences if place <= wished)
    before, after = text[:cut], text[cut:stop]
    prompt, start = _ask(tokenizer, f"{before}{needle.text} {after}", len(before), needle)
    ids = tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=False)
    places = ids["offset_mapping"]
    sentence = _span(places, start, start + len(needle.text))
    offset = start + needle.text.index(needle.answer)
    answer = _span(places, offset, offset + len(needle.answer))
    tokens = torch.tensor([ids["input_ids"]], device=opened.device)
    return Hidden(needle, context, depth, tokens, answer, sentence)


def _ask(tokenizer: object, body: str, place: int, needle: Needle) -> tuple[str, int]:
    """The whole prompt as text, and where in it the needle starts."""
    content = f"{body}\n\nAnswer with a few words from the text. {needle.question}"
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
    else:  # a model that only continues text is given the start of the answer's sentence
        prompt = f"{content}\n{needle.text[: needle.text.index(needle.answer)].rstrip()}"
    start = prompt.find(body)
    if start < 0:
        raise HeadwiseError(
            "The tokenizer's chat template changes the text it is given, so a needle cannot be found in it again."
        )
    return prompt, start + place


def _span(places: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The tokens that overlap the characters start to stop."""
    inside = [n for n, (a, b) in enumerate(places) if a < stop and b > start and b > a]
    return inside[0], inside[-1] + 1


def recall(response: str, answer: str) -> float:
    """ROUGE-1 recall: the share of the answer's words that the response holds."""
    wanted = Counter(re.findall(r"\w+", answer.lower()))
    given = Counter(re.findall(r"\w+", response.lower()))
    return sum((wanted & given).values()) / max(sum(wanted.values()), 1)


@torch.no_grad()
def prefill(opened: Opened, hidden: Hidden) -> Any:
    """The cache after a plain forward of all tokens but the last."""
    keep = {"logits_to_keep": 1} if accepts(opened.model, "logits_to_keep") else {}
    return opened.model(input_ids=hidden.ids[:, :-1], use_cache=True, **keep).past_key_values


@torch.no_grad()
def answer(
    opened: Opened, hidden: Hidden, state: Any, max_new: int, edits: Sequence[Edit] = (), top: int = 1
) -> tuple[float, list[int], xr.DataArray]:
    """Greedy decoding from a prefilled cache (it grows) until the answer is complete, a line ends or `max_new` tokens
    are there: ROUGE-1 recall, the tokens, and the `top` most attended keys of every step as [layer, head, step, rank].
    The query of step t is the token before the t-th generated one. `edits` act while decoding only."""
    model, tokenizer, ids = opened.model, opened.tokenizer, hidden.ids
    produced: list[int] = []
    found = 0.0
    step = ids[:, -1:]
    with attend(opened, readings=[Top(top, stream="text")], edits=edits) as run:
        while len(produced) < max_new and found < 1:
            seen = model(input_ids=step, past_key_values=state, use_cache=True)
            state, token = seen.past_key_values, int(seen.logits[0, -1].argmax())
            produced.append(token)
            said = tokenizer.decode(produced, skip_special_tokens=True)
            found = recall(said, hidden.needle.answer)
            if token in tokenizer.all_special_ids or "\n" in said.lstrip():
                break
            step = torch.tensor([[token]], device=ids.device)
    tops = run.tree["text"]["top_index"].isel(sample=0).transpose("layer", "head", "query", "rank")
    return found, produced, tops.rename(query="step")
