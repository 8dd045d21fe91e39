"""How much does a model gain from what it has read so far?

The in-context-learning score is the loss of a late token of a text minus that of an early one, `loss(500) - loss(50)`,
averaged over texts, in nats: the more negative, the more is learnt from the context. Places are counted from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.needs import accepts, lacks_language_model

Place = int | tuple[int, int]


@dataclass(frozen=True, eq=False)
class IclScore:
    """`per_text` [text]: loss at the late place minus loss at the early one. `loss` [token]: the mean loss of the
    second, third, ... token over all texts."""

    per_text: Float[np.ndarray, " text"]
    loss: Float[np.ndarray, " token"]
    paper: ClassVar[Paper] = Paper("In-context Learning and Induction Heads", "2209.11895")

    @property
    def score(self) -> float:
        return float(self.per_text.mean())

    @property
    def sem(self) -> float:
        """Standard error over texts; nan for one text."""
        count = len(self.per_text)
        return float(self.per_text.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")

    @property
    def slope(self) -> Float[np.ndarray, " token"]:
        """`d loss / d log(place)`, in nats, at the places of `loss`: below 0 while the context still helps."""
        return np.gradient(self.loss, np.log(np.arange(2, len(self.loss) + 2)))


def icl_score(
    opened: Opened,
    texts: Sequence[str] | Int[Tensor, "text token"],
    early: Place = 50,
    late: Place = 500,
    batch: int = 4,
) -> IclScore:
    """The score over texts (or rows of token ids), each cut after the late place. A pair such as `late=(490, 510)`
    takes the mean of these places, both included. Put it inside `attend(opened, edits=[...])` to score an edited model.

    Raises HeadwiseError for a text too short for the late place and for a model that predicts no next token."""
    reason = lacks_language_model(opened)
    if reason is not None:
        raise HeadwiseError(f"icl_score needs {reason}; {opened.name} does not have that.")
    spans = [as_span(early, "early"), as_span(late, "late")]
    ids = rows_of(opened, texts, spans[1][1])
    loss = token_losses(opened, ids, batch)
    at = [loss[:, a - 2 : b - 1].mean(1) for a, b in spans]
    return IclScore((at[1] - at[0]).double().numpy(), loss.double().mean(0).numpy())


def as_span(place: Place, name: str) -> tuple[int, int]:
    first, last = (place, place) if isinstance(place, int) else place
    if not 2 <= first <= last:
        raise HeadwiseError(f"{name}: wanted a place of at least 2, or a pair of places in order; got {place!r}.")
    return first, last


def rows_of(
    opened: Opened, texts: Sequence[str] | Int[Tensor, "text token"], length: int
) -> Int[Tensor, "text length"]:
    """The first `length` tokens of every text."""
    rows = texts if isinstance(texts, Tensor) else [opened.encode(text)["input_ids"][0] for text in texts]
    if not len(rows):
        raise HeadwiseError("texts: wanted at least one; got none.")
    short = [number for number, row in enumerate(rows) if len(row) < length]
    if short:
        raise HeadwiseError(
            f"texts: number {short[0]} has {len(rows[short[0]])} tokens; the score looks at token {length}."
        )
    return torch.stack([row[:length] for row in rows])


@torch.no_grad()
def token_losses(opened: Opened, ids: Int[Tensor, "text token"], batch: int = 4) -> Float[Tensor, "text token-1"]:
    """Loss in nats of every token but the first, on the CPU."""
    spared = {"use_cache": False} if accepts(opened.model, "use_cache") else {}
    found = []
    for rows in ids.split(batch):
        rows = rows.to(opened.device)
        logits = opened.model(input_ids=rows, **spared).logits[:, :-1]
        found.append(F.cross_entropy(logits.transpose(1, 2).float(), rows[:, 1:], reduction="none").cpu())
    return torch.cat(found)
