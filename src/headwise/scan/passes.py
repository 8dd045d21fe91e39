"""Which forward passes a scan needs: questions about the same inputs share them, and equal readings are made once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xarray as xr

from headwise.attention import attend
from headwise.attention.readings import Reading
from headwise.models import Opened
from headwise.scan.needs import quiet
from headwise.scan.question import Prompt, Question

SUFFIXES = ("", "_count", "_sem")


@dataclass
class Pass:
    """One forward pass (or, for a question that drives the model itself, what it does with one prompt)."""

    prompt: Prompt
    questions: list[Question]
    readings: list[Reading] = field(default_factory=list)
    renames: list[dict[str, str]] = field(default_factory=list)
    """For each question: name in the run -> the name the question knows."""

    @property
    def driven(self) -> bool:
        return self.questions[0].drives

    def run(self, opened: Opened, seed: int) -> list[dict[str, xr.Dataset]]:
        """What every question sees of this pass, per stream, reduced to dims that all its prompts share."""
        if self.driven:
            question = self.questions[0]
            return [question.observe(opened, self.prompt)]
        with (
            attend(opened, readings=self.readings, segments=self.prompt.segments, seed=seed) as run,
            torch.no_grad(),
        ):
            opened.model(**self.prompt.inputs, **quiet(opened.model))
        found: list[dict[str, xr.Dataset]] = []
        for question, names in zip(self.questions, self.renames, strict=True):
            mine: dict[str, xr.Dataset] = {}
            for stream in question.streams(opened):
                if stream not in run.tree.children:
                    continue
                node = run.tree[stream].to_dataset()
                if "call" in node.dims:  # a layer that attends twice in one forward: both count as one head
                    node = node.mean("call")
                there = {name: own for name, own in names.items() if name in node}
                mine[stream] = question.reduce(node[list(there)].rename(there), self.prompt)
            found.append(mine)
        return found


def make_pass(opened: Opened, prompt: Prompt, questions: Sequence[Question], queries: Any) -> Pass:
    """Merges the readings of questions about one prompt; `queries` holds for every reading that doesn't choose its
    own."""
    unique: dict[Reading, Reading] = {}
    renames: list[dict[str, str]] = []
    for question in questions:
        names: dict[str, str] = {}
        for reading in question.readings_at(opened, prompt):
            bare = replace(reading, name=None)
            if isinstance(bare.queries, str) and not hasattr(bare, "pairs"):
                bare = replace(bare, queries=queries)
            shared = unique.setdefault(bare, replace(bare, name=f"r{len(unique)}"))
            own = reading.names()
            for variable, given in shared.names().items():
                names |= {given + suffix: own[variable] + suffix for suffix in SUFFIXES}
        renames.append(names)
    return Pass(prompt, list(questions), list(unique.values()), renames)


@dataclass
class Plan:
    """All passes of a scan, and what they cost."""

    opened: Opened
    passes: list[Pass]

    @property
    def tokens(self) -> int:
        return sum(p.prompt.tokens for p in self.passes)

    @property
    def seconds(self) -> float:
        """A rough guess: two operations a parameter and token, at the speed one matrix product just ran at, twice over
        for everything else a forward pass does (and twice again where a question decodes)."""
        model = self.opened.model
        parameters = sum(p.numel() for p in model.parameters())
        weight = sum(p.prompt.tokens * (2 if p.driven else 1) for p in self.passes)
        return 2 * 2 * parameters * weight / _speed(self.opened.device)

    def __str__(self) -> str:
        questions = {q.name for p in self.passes for q in p.questions} - {"details"}
        return (
            f"{len(questions)} questions of {self.opened.name} in {len(self.passes)} passes over {self.tokens:,} "
            f"tokens, about {max(1, round(self.seconds))} s"
        )


def _speed(device: torch.device) -> float:
    """Operations a second of a product of two matrices of 768 x 768."""
    a = torch.randn(768, 768, device=device)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        b = a @ a
    float(b[0, 0])
    return 4 * 2 * 768**3 / (time.perf_counter() - start)


def make_plan(opened: Opened, prompts: Sequence[Prompt], questions: Sequence[Question], queries: Any) -> Plan:
    """The caller's prompts are read once for all questions about them; a question's own prompts follow, and the
    caller's again for questions that drive the model themselves."""
    own = {number: question.prompts(opened) for number, question in enumerate(questions)}
    shared = [q for number, q in enumerate(questions) if own[number] is None and not q.drives]
    passes = [make_pass(opened, prompt, shared, queries) for prompt in prompts if shared]
    for number, question in enumerate(questions):
        mine = own[number] or (prompts if question.drives and own[number] is None else ())
        for prompt in mine:
            if question.drives:
                passes.append(Pass(prompt, [question]))
            else:
                passes.append(make_pass(opened, prompt, [question], "all"))
    return Plan(opened, passes)
