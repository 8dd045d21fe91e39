"""Two forms a question can be put in: after examples with their labels, and with lettered choices."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from headwise.errors import HeadwiseError
from headwise.study.tasks import Example


def few_shot(
    shown: Sequence[tuple[str, str]],
    asked: Sequence[tuple[str, str]],
    shots: int = 4,
    seed: int = 0,
    form: str = "Input: {text}\nLabel: {label}\n\n",
) -> list[Example]:
    """Few-shot classification of your own (text, label) pairs: each of `asked` after `shots` of `shown`, drawn for it
    alone and, while they last, of every label in turn. The options are the labels of `shown`; segments "shot 1", ...,
    "text".

    >>> few_shot([("a cat", "animal"), ("a rose", "plant")], [("a dog", "animal")], shots=1)[0].options
    (' animal', ' plant')
    """
    labels = sorted({label for _, label in shown})
    if not 0 <= shots <= len(shown) or not 0 <= form.find("{text}") < form.find("{label}"):
        raise HeadwiseError(
            f"few_shot wants shots= of at most the {len(shown)} examples shown and a form= with {{text}} before one "
            f"{{label}}; got {shots} and {form!r}."
        )
    rng = np.random.default_rng(seed)
    opening = form[: form.index("{label}")].rstrip(" ")
    found = []
    for text, label in asked:
        if label not in labels:
            raise HeadwiseError(f"few_shot: no example shows the label {label!r}; shown are {', '.join(labels)}.")
        prompt, spans = "", {}
        for n, (example, its) in enumerate(balanced(shown, labels, shots, rng)):
            start = len(prompt)
            prompt += form.format(text=example, label=its)
            spans[f"shot {n + 1}"] = (start, len(prompt.rstrip()))
        start = len(prompt) + opening.index("{text}")
        prompt += opening.format(text=text)
        spans["text"] = (start, start + len(text))
        found.append(Example(prompt, tuple(f" {its}" for its in labels), labels.index(label), spans))
    return found


def balanced(
    shown: Sequence[tuple[str, str]], labels: Sequence[str], shots: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """`shots` examples in random order, of every label as many as can be."""
    drawn = [shown[n] for n in rng.permutation(len(shown))]
    turns = {label: [pair for pair in drawn if pair[1] == label] for label in labels}
    rounds = [turns[label][n] for n in range(len(shown)) for label in labels if n < len(turns[label])]
    return [rounds[n] for n in rng.permutation(shots)]


def lettered(examples: Sequence[Example], seed: int = 0, cue: str = "Answer:") -> list[Example]:
    """The same questions as multiple choice: their options in random order behind letters, which are the new options.
    Segments: those of the question, and "choices"."""
    rng = np.random.default_rng(seed)
    found = []
    for example in examples:
        order = rng.permutation(len(example.options)).tolist()
        lines = [f"{letter}.{example.options[n]}" for letter, n in zip(ascii_uppercase, order, strict=False)]
        start = len(example.prompt) + 1
        choices = "\n".join(lines)
        gold = None if example.gold is None else order.index(example.gold)
        spans = {**example.spans, "choices": (start, start + len(choices))}
        letters = tuple(f" {letter}" for letter in ascii_uppercase[: len(order)])
        found.append(Example(f"{example.prompt}\n{choices}\n{cue}", letters, gold, spans, example.place))
    return found
