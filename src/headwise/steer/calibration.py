"""One way to calibrate any method: on prompts whose right answer is known.

A method that learns is given the examples in the form its own `calibrate` wants. For one that has only settings, those
of a grid are tried, and the one is kept that makes the right answers most probable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import singledispatch
from inspect import signature
from itertools import product
from typing import Any, TypeVar

import torch

from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.steer.choices import Choice, check_writes, shared_tokens
from headwise.steer.concept_heads import ConceptHeads
from headwise.steer.examples import Example
from headwise.steer.focus_directions import Focus, FocusDirections
from headwise.steer.found_in_the_middle import FoundInTheMiddle
from headwise.steer.freeze_positional import FreezeToPositional
from headwise.steer.method import Method, apply
from headwise.steer.soft_injection import SoftInjection

M = TypeVar("M", bound=Method)
SHOTS = 4
"""Solved examples in front of each of the few-shot prompts that `SoftInjection` learns from."""


def calibrate(
    opened: Opened,
    method: M,
    examples: Sequence[Example | Choice],
    grid: Mapping[str, Sequence[Any]] | None = None,
    score: Callable[[Opened, Sequence[Example], Method], float] | None = None,
    **options: Any,
) -> M:
    """A copy of the method, made ready on the examples.

    Without `grid`, by the method's own `calibrate`, which `options` go to; else every combination of the grid's
    settings (None: the method's own `space`) is tried, and the one with the highest `score` is kept (None: the mean
    log-probability of the right answers); the first one, where several are equal.

    >>> steer.calibrate(opened, steer.Emphasis(), examples, grid={"alpha": (1.0, 0.1, 0.01)})
    """
    if not isinstance(opened, Opened) or not isinstance(method, Method):
        raise HeadwiseError(
            f"calibrate wants an opened model and a method such as steer.TokenScale(); got a {type(opened).__name__} "
            f"and {method!r}."
        )
    cases = [Example.of(example) for example in examples]
    if not cases:
        raise HeadwiseError("examples: wanted one or more; got none.")
    own = getattr(method, "calibrate", None)
    if grid is None and score is None and own is not None:
        given = wanted(method, opened, cases)
        known = list(signature(own).parameters)[1 + len(given) :]
        strange = [name for name in options if name not in known]
        if strange:
            raise HeadwiseError(
                f"calibrate: {type(method).__name__} takes {', '.join(known)} as arguments; got {', '.join(strange)}."
            )
        return own(opened, *given, **options)
    if options:
        raise HeadwiseError(
            f"calibrate: {', '.join(options)} goes to a method's own calibrate, which is not used here."
        )
    space = method.space if grid is None else grid
    if not isinstance(space, Mapping):
        raise HeadwiseError(f"grid: wanted a mapping of settings to values to try; got {space!r}.")
    if not space:
        raise HeadwiseError(
            f"{type(method).__name__} has nothing to calibrate: give grid={{setting: values to try}} to search one."
        )
    known = [f.name for f in fields(method)]
    for name, values in space.items():
        if name not in known or not isinstance(values, Collection) or isinstance(values, str) or not len(values):
            raise HeadwiseError(f"grid: wanted values to try for some of {', '.join(known)}; got {name!r}: {values!r}.")
    tried = [replace(method, **dict(zip(space, values, strict=True))) for values in product(*space.values())]
    judge = score or answer_logprob
    return max(tried, key=lambda one: judge(opened, cases, one))


def answer_logprob(opened: Opened, examples: Sequence[Example], method: Method) -> float:
    """Mean log-probability (nats) of the right answers under the method, made ready for each prompt, which may speak of
    the examples' segments."""
    check_writes(opened)
    total = 0.0
    for example in examples:
        batch = opened.encode(example.prompt)
        text = opened.encode(example.prompt + example.answer)["input_ids"][0]
        shared = shared_tokens(batch["input_ids"][0], text, example.answer)
        parts = example.segments(opened).extend(len(text) - 1)
        parts = Segments(parts.names, parts.labels[..., : len(text) - 1])
        ready = method.prepare(opened, batch).answering(len(text) - shared)
        with apply(opened, ready, segments=parts), torch.no_grad():
            chances = opened.model(input_ids=text[None, :-1]).logits[0, shared - 1 :].float().log_softmax(-1)
        total += float(chances.gather(-1, text[shared:, None]).sum())
    return total / len(examples)


@singledispatch
def wanted(method: Method, opened: Opened, examples: Sequence[Example]) -> tuple[Any, ...]:
    """The arguments after the model that a method's own `calibrate` wants: mostly Choices."""
    check_writes(opened)
    every = tuple(dict.fromkeys(example.answer for example in examples))
    found = []
    for example in examples:
        options = example.options or every
        found.append(Choice(example.prompt, options, options.index(example.answer)))
    return (found,)


@wanted.register
def _(method: FocusDirections, opened: Opened, examples: Sequence[Example]) -> tuple[Any, ...]:
    found = []
    for example in examples:
        if "relevant" not in example.spans:
            raise HeadwiseError(
                f'FocusDirections wants examples with a segment "relevant"; got {list(example.spans)} for '
                f"{example.prompt[-40:]!r}."
            )
        text = example.prompt + example.answer
        spans = {"relevant": example.spans["relevant"], "answer": (len(example.prompt), len(text))}
        found.append(Focus(opened.encode(text)["input_ids"], Segments.from_characters(text, spans, opened.tokenizer)))
    return (found,)


@wanted.register
def _(method: FreezeToPositional, opened: Opened, examples: Sequence[Example]) -> tuple[Any, ...]:
    return ([example.prompt + example.answer for example in examples],)


@wanted.register
def _(method: SoftInjection, opened: Opened, examples: Sequence[Example]) -> tuple[Any, ...]:
    """A quarter of the examples is held out; each of the others is the question of one few-shot prompt."""
    held = max(1, len(examples) // 4)
    train, valid = examples[held:], examples[:held]
    if len(train) < 2:
        raise HeadwiseError(f"SoftInjection wants three or more examples; got {len(examples)}.")
    shots = []
    for n, example in enumerate(train):
        others = [train[(n + m) % len(train)] for m in range(1, min(SHOTS, len(train) - 1) + 1)]
        shots.append("\n\n".join([*(o.prompt + o.answer for o in others), example.prompt]))
    return shots, *([(e.prompt, e.answer) for e in some] for some in (train, valid))


@wanted.register
def _(method: ConceptHeads, opened: Opened, examples: Sequence[Example]) -> tuple[Any, ...]:
    """The answers are the concept's words."""
    words = dict.fromkeys(example.answer.strip() for example in examples)
    return [example.prompt for example in examples], list(words)


@wanted.register
def _(method: FoundInTheMiddle, opened: Opened, examples: Sequence[Example]) -> tuple[Any, ...]:
    raise HeadwiseError(
        "FoundInTheMiddle is made ready for one prompt and its documents, not on examples: call its "
        "calibrate(opened, before, docs, after)."
    )
