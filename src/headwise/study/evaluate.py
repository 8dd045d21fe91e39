"""Does steering help this model on this task? Every example is answered plain and under each setting, and compared.

table = evaluate(opened, tasks.documents(seed=0, count=40), {"emphasis": lambda e: [steer.Emphasis("document 3")]})
difference(table, "emphasis", "logp")       # mean change with its 95% interval, over the same examples
place_curve(table)                          # by the place of the gold document
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.steer import Method, apply
from headwise.steer.choices import check_writes, shared_tokens
from headwise.study.tasks import Example

PLAIN = "plain"
Setting = Callable[[Example], Sequence[Method]]
"""The methods for an example: the same for all, or made ready for its prompt."""
DRAWS = 2000


def evaluate(
    opened: Opened,
    examples: Sequence[Example],
    settings: Mapping[str, Setting | Sequence[Method]],
    per: Literal["option", "byte"] = "option",
) -> pd.DataFrame:
    """A row per example and setting ("plain" is always there): `right` (the gold option scores highest), `logp`
    (log-probability of the gold option, nats), `share` (its probability among the options), `place`.

    An option's score is the log-probability of all of its tokens; `per="byte"` divides it by the option's length in
    bytes, so that long answers are not at a disadvantage: the `acc_norm` of lm-eval. Then `logp` is per byte too."""
    if not examples or PLAIN in settings:
        raise HeadwiseError('evaluate wants examples, and settings of other names than "plain".')
    if per not in ("option", "byte"):
        raise HeadwiseError(f'per: wanted "option" or "byte"; got {per!r}.')
    rows = []
    for number, example in enumerate(examples):
        if example.gold is None:
            raise HeadwiseError("evaluate wants examples whose gold is known.")
        length = torch.tensor([1 if per == "option" else len(option.encode()) for option in example.options])
        asked = Asked(opened, example)
        for name, setting in {PLAIN: (), **settings}.items():
            found = asked.scores(setting(example) if callable(setting) else setting).cpu() / length
            rows.append(
                {
                    "setting": name,
                    "example": number,
                    "place": example.place,
                    "right": float(int(found.argmax()) == example.gold),
                    "logp": float(found[example.gold]),
                    "share": float(found.softmax(-1)[example.gold]),
                }
            )
    return pd.DataFrame(rows)


class Asked:
    """An example as the model reads it. What stands before its last token is read once, for all methods that change
    nothing there."""

    def __init__(self, opened: Opened, example: Example):
        check_writes(opened)
        self.opened, self.example, self.segments = opened, example, example.segments(opened)
        self.batch = opened.encode(example.prompt)
        self.prompt = self.batch["input_ids"][0]
        self.texts = [opened.encode(example.prompt + option)["input_ids"][0] for option in example.options]
        start = len(self.prompt)
        self.single = all(len(t) == start + 1 and torch.equal(t[:start], self.prompt) for t in self.texts)

    def scores(self, methods: Sequence[Method] = ()) -> Float[Tensor, " option"]:
        """Log-probability of each option under the methods, made ready for the prompt, which may speak of the example's
        segments. The tokens of an option, where it has several, are "generated"."""
        methods = [method.prepare(self.opened, self.batch) for method in methods]
        with torch.no_grad():
            if not self.single:
                return torch.stack([self.continued(n, methods) for n in range(len(self.texts))])
            last = self.last(methods).float().log_softmax(-1)
            return last[torch.stack([text[-1] for text in self.texts])]

    def last(self, methods: Sequence[Method]) -> Float[Tensor, " token"]:
        """The logits behind the prompt."""
        model, ids = self.opened.model, self.prompt[None]
        if len(self.prompt) > 1 and self.past is not None and only_last(self.opened, methods):
            with steered(self.opened, methods, self.segments):
                return model(input_ids=ids[:, -1:], past_key_values=deepcopy(self.past)).logits[0, -1]
        with steered(self.opened, methods, self.segments):
            return model(input_ids=ids).logits[0, -1]

    @cached_property
    def past(self) -> Any:
        """The cache of all tokens but the last; None for a model that keeps none."""
        return getattr(self.opened.model(input_ids=self.prompt[None, :-1]), "past_key_values", None)

    def continued(self, number: int, methods: Sequence[Method]) -> Float[Tensor, ""]:
        text = self.texts[number]
        shared = shared_tokens(self.prompt, text, self.example.options[number])
        methods = [method.answering(len(text) - shared + 1) for method in methods]
        with steered(self.opened, methods, self.segments.extend(len(text))):
            chances = self.opened.model(input_ids=text[None]).logits[0, shared - 1 : -1].float().log_softmax(-1)
        return chances.gather(-1, text[shared:, None]).sum()


def steered(opened: Opened, methods: Sequence[Method], segments: Segments | None) -> AbstractContextManager:
    return apply(opened, *methods, segments=segments) if methods else nullcontext()


def only_last(opened: Opened, methods: Sequence[Method]) -> bool:
    """Whether the methods change no token before the last of the prompt."""
    edits = [edit for method in methods for edit in method.edits(opened)]
    rows = {getattr(edit, "queries", None) or getattr(edit, "tokens", None) for edit in edits}
    return rows <= {"last", "generated"} and all(type(method).hooks is Method.hooks for method in methods)


class Difference(NamedTuple):
    mean: float
    low: float
    high: float


def difference(
    table: pd.DataFrame, setting: str, measure: str = "logp", against: str = PLAIN, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """The mean change of a measure over the same examples, with a 95% bootstrap interval."""
    wide = table.pivot(index="example", columns="setting", values=measure)
    for name in (setting, against):
        if name not in wide:
            raise HeadwiseError(f"difference: there is no setting {name!r}; there are {', '.join(map(str, wide))}.")
    return interval((wide[setting] - wide[against]).to_numpy(), draws, seed)


def interval(values: Float[np.ndarray, " example"], draws: int = DRAWS, seed: int = 0) -> Difference:
    """A mean with its 95% bootstrap interval."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(values.mean()), float(low), float(high))


def place_curve(table: pd.DataFrame, measure: str = "logp", draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """A measure by setting and by the place of the gold item (0 is the first): mean, the ends of its 95% bootstrap
    interval, and how many examples."""
    placed = table.dropna(subset="place")
    if placed.empty:
        raise HeadwiseError("place_curve wants examples whose gold item has a place, such as tasks.documents makes.")
    rows = [
        {"setting": setting, "place": int(place), **interval(group[measure].to_numpy(), draws, seed)._asdict()}
        | {"count": len(group)}
        for (setting, place), group in placed.groupby(["setting", "place"], sort=True)
    ]
    return pd.DataFrame(rows)


def perplexity(
    opened: Opened,
    text: str,
    methods: Sequence[Method] = (),
    length: int = 256,
    windows: int = 4,
    segments: Segments | None = None,
    start: int = 1,
) -> float:
    """e to the mean loss per token on evenly spread windows of the text. `segments` name the tokens of every window for
    methods that speak of them; the loss is that of the tokens from place `start` on, as the model would write them."""
    check_writes(opened)
    ids = opened.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if len(ids) < length:
        raise HeadwiseError(f"length: the text has {len(ids)} tokens, fewer than the {length} asked for.")
    if not 1 <= start < length:
        raise HeadwiseError(f"start: wanted a place from 1 to {length - 1} in windows of {length}; got {start}.")
    losses = []
    for first in np.linspace(0, len(ids) - length, windows).astype(int):
        window = ids[None, first : first + length].to(opened.device)
        ready = [method.prepare(opened, {"input_ids": window}).answering(length - start + 1) for method in methods]
        with steered(opened, ready, segments), torch.no_grad():
            logits = opened.model(input_ids=window).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits[0, start - 1 : -1].float(), window[0, start:])))
    return float(np.exp(np.mean(losses)))
