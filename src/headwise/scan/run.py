"""`scan.heads`: ask every head of a model some questions, in as few forward passes as they need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments, open_model
from headwise.scan.catalogue import CORE, QUESTIONS
from headwise.scan.checkpoint import Checkpoint
from headwise.scan.details import Details
from headwise.scan.passes import Plan, make_plan
from headwise.scan.positional import separators
from headwise.scan.progress import Report, reporting
from headwise.scan.question import Prompt, Question
from headwise.scan.result import Scan, assemble


def heads(
    model: Opened | nn.Module | str,
    texts: str | Sequence[str] | None = None,
    inputs: Any = None,
    questions: Sequence[str | Question] | str | None = None,
    queries: int | str | Sequence[int] = "all",
    segments: Segments | Sequence[Segments] | None = None,
    progress: bool | Report | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    command: str = "",
) -> Scan:
    """One score per question and head.

    Give `texts`, or `inputs`: a list of model inputs, pictures or sounds (anything `opened.encode` takes). `questions`
    are names or instances; None asks the core ones that fit the model, "all" every one there is, and `Scan.left_out`
    says why others don't fit.
    `queries=256` reads that many random queries of each input instead of all. `segments` names the tokens of each
    input. `progress=True` shows cost and a bar; a function gets (passes done, passes in all, what is next). With
    `checkpoint=` a scan that was stopped goes on where it was. `command` is what the report says it was made by.

    >>> result = scan.heads(opened, texts=["..."], questions=["sinks", scan.InductionHeads(seeds=3)])
    >>> result.top("sinks", 5)
    """
    opened = model if isinstance(model, Opened) else open_model(model)
    chosen, left_out = choose(opened, questions, seed)
    prompts = make_prompts(opened, texts, inputs, segments)
    lenient = unnamed(questions)
    plan, chosen = _plan(opened, prompts, chosen, left_out, queries, lenient)
    store = Checkpoint(checkpoint, plan, seed)
    failed = store.failed if lenient else None
    with evaluating(opened.model), reporting(progress, plan, len(plan.passes)) as report:
        try:
            for number, one in enumerate(plan.passes):
                if number not in store.done:
                    names = [q.name for q in one.questions if not isinstance(q, Details)]
                    report(number, len(plan.passes), shortened(names))
                    store.add(number, one.run(opened, seed, failed))
            report(len(plan.passes), len(plan.passes), "done")
        finally:
            store.write()
    left_out |= store.failed
    chosen = [question for question in chosen if question.name not in left_out]
    result = assemble(plan, chosen, store.done, prompts, left_out, lenient=lenient, seed=seed, command=command)
    store.finish()
    return result


def plan(
    model: Opened | nn.Module | str,
    texts: str | Sequence[str] | None = None,
    inputs: Any = None,
    questions: Sequence[str | Question] | str | None = None,
    queries: int | str | Sequence[int] = "all",
    segments: Segments | Sequence[Segments] | None = None,
) -> Plan:
    """The passes `heads` would make with the same arguments, their tokens and a guess of the seconds; runs none of
    them."""
    opened = model if isinstance(model, Opened) else open_model(model)
    chosen, left_out = choose(opened, questions)
    prompts = make_prompts(opened, texts, inputs, segments)
    return _plan(opened, prompts, chosen, left_out, queries, lenient=unnamed(questions))[0]


def choose(
    opened: Opened, questions: Sequence[str | Question] | str | None, seed: int = 0
) -> tuple[list[Question], dict[str, str]]:
    """The questions asked for, or all of a kind that fit, and why the others don't."""
    known = {kind().name: kind for kind in QUESTIONS}
    if unnamed(questions):
        fitting = [default(kind, seed) for kind in (CORE if questions is None else QUESTIONS)]
        reasons = {q.name: q.lacks(opened) for q in fitting}
        return [q for q in fitting if reasons[q.name] is None], {
            name: f"needs {reason}" for name, reason in reasons.items() if reason is not None
        }
    if isinstance(questions, str | Question):
        questions = [questions]
    chosen: list[Question] = []
    for question in questions:
        if isinstance(question, str):
            if question not in known:
                raise HeadwiseError(f"questions: there is none called {question!r}; there are {', '.join(known)}.")
            question = default(known[question], seed)
        if not isinstance(question, Question):
            raise HeadwiseError(f"questions: wanted names or Question objects; got {question!r}.")
        reason = question.lacks(opened)
        if reason is not None:
            raise HeadwiseError(f"questions: {question.name} needs {reason}; {opened.name} does not have that.")
        chosen.append(question)
    names = [q.name for q in chosen]
    if not chosen or len(set(names)) != len(names):
        raise HeadwiseError(f"questions: wanted one or more different questions; got {names}.")
    return chosen, {}


def unnamed(questions: Sequence[str | Question] | str | None) -> bool:
    """Whether nobody asked for a question by name: what does not fit the model may then be left out."""
    return questions is None or questions == "all"


def default(kind: type[Question], seed: int) -> Question:
    """A question with its defaults; its random tokens follow the seed of the scan."""
    return replace(kind(), first_seed=seed) if "first_seed" in {f.name for f in fields(kind)} else kind()


def make_prompts(
    opened: Opened, texts: str | Sequence[str] | None, inputs: Any, segments: Segments | Sequence[Segments] | None
) -> list[Prompt]:
    """One prompt for every text or input: texts are not padded together, so that every score is of real tokens only."""
    if texts is not None and inputs is not None:
        raise HeadwiseError("Give either texts= or inputs=, not both.")
    if texts is not None:
        given: list[Any] = [texts] if isinstance(texts, str) else list(texts)
    elif inputs is not None:
        given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    else:
        given = []
    names = [segments] * len(given) if isinstance(segments, Segments) else list(segments or [None] * len(given))  # type: ignore[list-item]
    if len(names) != len(given):
        raise HeadwiseError(f"segments: wanted one for each of the {len(given)} inputs; got {len(names)}.")
    batches = [opened.encode(one) for one in given]
    return [Prompt(batch, name_streams(opened, batch, name)) for batch, name in zip(batches, names, strict=True)]


def name_streams(opened: Opened, batch: dict[str, Any], segments: Segments | None) -> dict[str, Segments] | None:
    """Which stream an input's segments belong to: the text where there are token ids, else the only stream there is."""
    streams = list(dict.fromkeys(site.stream for site in opened.sites if site.kind == "self"))
    stream = "text" if "text" in streams and "input_ids" in batch else streams[0] if len(streams) == 1 else None
    if stream is None:
        if segments is not None:
            raise HeadwiseError(
                f"segments: can be given for inputs of one stream only; {opened.name} has {', '.join(streams)}."
            )
        return None
    if segments is None:
        try:
            segments = refine(opened, batch, opened.segments(batch))
        except HeadwiseError:  # inputs with no names of their own: the report then has no masses per segment
            return None
    elif stream == "text":
        segments.validate(batch["input_ids"].shape[1])
    return {stream: segments}


def refine(opened: Opened, batch: dict[str, Any], segments: Segments) -> Segments:
    """Ordinary text split into its first token, separators and the rest; tokens with a name keep it."""
    marks = separators(opened, batch)
    if marks is None or "text" not in segments.names:
        return segments
    labels = segments.labels.clone().reshape(-1)
    names = [*segments.names, *(n for n in ("first", "separator") if n not in segments.names)]
    plain = labels == names.index("text")
    labels[plain & (marks.to(labels.device) > 0)] = names.index("separator")
    if plain[0]:
        labels[0] = names.index("first")
    used = labels.unique().tolist()
    return Segments(tuple(names[n] for n in used), torch.tensor([used.index(n) for n in labels.tolist()]))


def _plan(
    opened: Opened, prompts: list[Prompt], chosen: list[Question], left_out: dict[str, str], queries: Any, lenient: bool
) -> tuple[Plan, list[Question]]:
    """Drops questions whose own prompts the model cannot take, if nobody asked for them by name."""
    own: dict[str, list[Prompt] | None] = {}
    for question in chosen:
        try:
            own[question.name] = question.prompts(opened)
        except HeadwiseError as error:
            if not lenient:
                raise
            left_out[question.name] = str(error)
            continue
        if own[question.name] is None and not prompts:
            raise HeadwiseError(
                f"texts: {question.name} is asked of your texts or inputs; give texts=[...] or inputs=[...]."
            )
    fitting = [question for question in chosen if question.name in own]
    details = [Details(max(p.length for p in prompts))] if prompts else []
    own |= {question.name: None for question in details}
    plan = make_plan(opened, prompts, [*fitting, *details], own, queries, left_out if lenient else None)
    return plan, [question for question in fitting if question.name not in left_out]


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The names of a pass's questions, for the line above a progress bar."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for the scan and puts every module back into its mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
