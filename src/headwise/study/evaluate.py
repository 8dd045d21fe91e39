"""Does steering help this model on this task? Every example is answered plain and under each setting, and compared.

table = evaluate(opened, tasks.documents(seed=0, count=40), {"emphasis": lambda e: [steer.Emphasis("document 3")]})
difference(table, "emphasis", "logp")       # mean change with its 95% interval, over the same examples
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.steer import Method, apply, option_logprobs
from headwise.study.tasks import Example

PLAIN = "plain"
Setting = Callable[[Example], Sequence[Method]]
"""The methods for an example: the same for all, or made ready for its prompt."""


def evaluate(
    opened: Opened, examples: Sequence[Example], settings: Mapping[str, Setting | Sequence[Method]]
) -> pd.DataFrame:
    """A row per example and setting ("plain" is always there): `right` (the gold option is the most probable), `logp`
    (log-probability of the gold option, nats), `share` (its probability among the options), `place`."""
    if not examples or PLAIN in settings:
        raise HeadwiseError('evaluate wants examples, and settings of other names than "plain".')
    rows = []
    for number, example in enumerate(examples):
        if example.gold is None:
            raise HeadwiseError("evaluate wants examples whose gold is known.")
        segments = example.segments(opened)
        for name, setting in {PLAIN: (), **settings}.items():
            methods = setting(example) if callable(setting) else setting
            if methods:
                with apply(opened, *methods, segments=segments):
                    found = option_logprobs(opened, example)
            else:
                found = option_logprobs(opened, example)
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


class Difference(NamedTuple):
    mean: float
    low: float
    high: float


def difference(
    table: pd.DataFrame, setting: str, measure: str = "logp", against: str = PLAIN, draws: int = 2000, seed: int = 0
) -> Difference:
    """The mean change of a measure over the same examples, with a 95% bootstrap interval."""
    wide = table.pivot(index="example", columns="setting", values=measure)
    for name in (setting, against):
        if name not in wide:
            raise HeadwiseError(f"difference: there is no setting {name!r}; there are {', '.join(map(str, wide))}.")
    change = (wide[setting] - wide[against]).to_numpy()
    rng = np.random.default_rng(seed)
    means = change[rng.integers(len(change), size=(draws, len(change)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(change.mean()), float(low), float(high))


def perplexity(opened: Opened, text: str, methods: Sequence[Method] = (), length: int = 256, windows: int = 4) -> float:
    """e to the mean loss per token on evenly spread windows of the text."""
    ids = opened.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if len(ids) < length:
        raise HeadwiseError(f"length: the text has {len(ids)} tokens, fewer than the {length} asked for.")
    starts = np.linspace(0, len(ids) - length, windows).astype(int)
    losses = []
    for start in starts:
        window = ids[None, start : start + length].to(opened.device)
        with torch.no_grad():
            if methods:
                with apply(opened, *methods):
                    logits = opened.model(input_ids=window).logits
            else:
                logits = opened.model(input_ids=window).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])
        losses.append(float(loss))
    return float(np.exp(np.mean(losses)))
