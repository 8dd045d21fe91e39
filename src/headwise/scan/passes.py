"""Which forward passes a scan needs: questions about the same inputs share them, and equal readings are made once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import xarray as xr

from headwise.attention import Run, attend
from headwise.attention.readings import Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.costs import extra, plain_seconds
from headwise.scan.needs import quiet
from headwise.scan.question import Prompt, Question

SUFFIXES = ("", "_count", "_sem")
Asked = tuple[Question, Prompt]


@dataclass
class Pass:
    """One forward pass (or, for a question that drives the model itself, what it does with one prompt). Every question
    has a prompt of its own; their inputs are the same."""

    questions: list[Question]
    prompts: list[Prompt]
    readings: list[Reading] = field(default_factory=list)
    renames: list[dict[str, str]] = field(default_factory=list)
    """For each question: name in the run -> the name the question knows."""

    @property
    def prompt(self) -> Prompt:
        return self.prompts[0]

    @property
    def driven(self) -> bool:
        return self.questions[0].drives

    def run(self, opened: Opened, seed: int, failed: dict[str, str] | None = None) -> list[dict[str, xr.Dataset]]:
        """What every question sees of this pass, per stream, reduced to dims that all its prompts share. With `failed`
        a question that cannot use what it sees is written down there, and the others go on."""
        if failed is not None and all(question.name in failed for question in self.questions):
            return [{} for _ in self.questions]
        if self.driven:
            return [attempt(self.questions[0], failed, partial(self.questions[0].observe, opened, self.prompt))]
        with (
            attend(opened, readings=self.readings, segments=self.prompt.segments, seed=seed) as run,
            torch.no_grad(),
        ):
            opened.model(**self.prompt.inputs, **quiet(opened.model))
        found = []
        for question, prompt, names in zip(self.questions, self.prompts, self.renames, strict=True):
            nodes = read(run, [reading for reading in self.readings if reading.name in names])
            look = partial(seen_by, opened, question, prompt, names, nodes)
            found.append(attempt(question, failed, look))
        return found


def read(run: Run, readings: list[Reading]) -> dict[str, xr.Dataset]:
    """The values of some readings, per stream. Every question's stand apart, as two of them may give one dim (target,
    rank, column) different sizes."""
    tally = run.tally
    part = replace(
        tally,
        chunks={key: values for key, values in tally.chunks.items() if key[1] in readings},
        moments={key: values for key, values in tally.moments.items() if key[1] in readings},
        _tree=None,
    )
    if part.empty:
        return {}
    tree = part.tree({site.name: site for site in run.session.sites})
    return {str(stream): node.to_dataset() for stream, node in tree.children.items()}


def attempt(
    question: Question, failed: dict[str, str] | None, look: Callable[[], dict[str, xr.Dataset]]
) -> dict[str, xr.Dataset]:
    try:
        return look()
    except HeadwiseError as error:
        if failed is None:
            raise
        failed[question.name] = str(error)
        return {}


def seen_by(
    opened: Opened, question: Question, prompt: Prompt, names: Mapping[str, str], nodes: Mapping[str, xr.Dataset]
) -> dict[str, xr.Dataset]:
    """The values of one question's readings, under the names it knows, reduced."""
    mine: dict[str, xr.Dataset] = {}
    for stream in question.streams(opened):
        if stream not in nodes:
            continue
        node = nodes[stream]
        if "call" in node.dims:  # a layer that attends twice in one forward: both count as one head
            node = node.mean("call")
        there = {name: own for name, own in names.items() if name in node}
        mine[stream] = question.reduce(node[list(there)].rename(there), prompt)
    return mine


@dataclass
class Plan:
    """All passes of a scan, and what they cost."""

    opened: Opened
    passes: list[Pass]

    @property
    def tokens(self) -> int:
        return sum(p.prompt.tokens for p in self.passes)

    @property
    def questions(self) -> list[str]:
        """The names of all questions asked, once each."""
        return list(dict.fromkeys(q.name for p in self.passes for q in p.questions if q.name != "details"))

    @property
    def seconds(self) -> float:
        """A guess: plain forward passes at the speed one matrix product just ran at, and what each question takes on
        top, as `benchmarks/scan_questions.py` measured it."""
        weight = sum(p.prompt.tokens * (1 + sum(extra(q) for q in p.questions)) for p in self.passes)
        return plain_seconds(self.opened) * weight

    def __str__(self) -> str:
        seconds = self.seconds
        time = f"{max(1, round(seconds))} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
        return (
            f"{plural(len(self.questions), 'question')} of {self.opened.name} in {plural(len(self.passes), 'pass')} "
            f"over {plural(self.tokens, 'token')}, about {time}"
        )


def plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 'es' if word.endswith('s') else 's'}"


def make_plan(
    opened: Opened,
    prompts: Sequence[Prompt],
    questions: Sequence[Question],
    own: Mapping[str, list[Prompt] | None],
    queries: Any,
    failed: dict[str, str] | None = None,
) -> Plan:
    """The caller's prompts are read once for all questions about them. Questions' own prompts (`own`, by name) follow,
    those with the same inputs shared too; questions that drive the model themselves have passes of their own."""
    plain = [q for q in questions if not q.drives]
    shared = [q for q in plain if own[q.name] is None]
    passes = [made for p in prompts if (made := make_pass(opened, [(q, p) for q in shared], queries, failed))]
    groups: dict[str, list[Asked]] = {}
    for question in plain:
        seen: dict[str, int] = {}
        for prompt in own[question.name] or ():
            same = likeness(prompt)
            seen[same] = seen.get(same, 0) + 1  # a question that reads one input twice wants it twice
            groups.setdefault(f"{same} {seen[same]}", []).append((question, prompt))
    passes += [made for group in groups.values() if (made := make_pass(opened, group, "all", failed))]
    for question in questions:
        if question.drives:
            mine = own[question.name]
            passes += [Pass([question], [prompt]) for prompt in (prompts if mine is None else mine)]
    return Plan(opened, passes)


def make_pass(opened: Opened, asked: Sequence[Asked], queries: Any, failed: dict[str, str] | None) -> Pass | None:
    """Merges the readings of questions about one input; `queries` holds for every reading that doesn't choose its
    own. None where no question is left."""
    unique: dict[Reading, Reading] = {}
    made = Pass([], [])
    for question, prompt in asked:
        try:
            readings = question.readings_at(opened, prompt)
        except HeadwiseError as error:
            if failed is None:
                raise
            failed[question.name] = str(error)
            continue
        names: dict[str, str] = {}
        for reading in readings:
            bare = replace(reading, name=None)
            if isinstance(bare.queries, str) and not hasattr(bare, "pairs"):
                bare = replace(bare, queries=queries)
            one = unique.setdefault(bare, replace(bare, name=f"r{len(unique)}"))
            own = reading.names()
            for variable, given in one.names().items():
                names |= {given + suffix: own[variable] + suffix for suffix in SUFFIXES}
        made.questions.append(question)
        made.prompts.append(prompt)
        made.renames.append(names)
    made.readings = list(unique.values())
    return made if made.questions else None


def likeness(prompt: Prompt) -> str:
    """A checksum of the inputs and of the names of their tokens: equal for prompts that one forward pass serves."""
    digest = hashlib.sha256()
    for name, value in sorted(prompt.inputs.items()):
        digest.update(f"{name} {getattr(value, 'dtype', '')} {tuple(getattr(value, 'shape', ()))}".encode())
        digest.update(contents(value))
    for stream, segments in sorted((prompt.segments or {}).items()):
        digest.update(f"{stream} {segments.names}".encode() + contents(segments.labels))
    return digest.hexdigest()


def contents(value: Any) -> bytes:
    return value.detach().cpu().float().numpy().tobytes() if hasattr(value, "detach") else repr(value).encode()
