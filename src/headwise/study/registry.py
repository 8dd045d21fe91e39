"""The list of studies, found by importing every module of `headwise.study`, and the findings they left.

A study is a plain function with a decorator:

    @study("sinks_are_first", paper=Paper("The paper's exact title", "2410.10781"), room="scan",
           claim="Most heads of a language model send most of their attention to the first token.")
    def sinks_are_first(**options) -> Finding:
        ...

Findings are JSON files, one a study. In a checkout they live in its `evidence/`, under version control; an installed
headwise reads those it came with and writes new ones to the user's data folder, which then count first.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.study.finding import Finding, hardware, versions

ROOMS = ("scan", "steer", "swap", "slim", "trace")
_PACKAGE = Path(__file__).resolve().parent
_REGISTERED: dict[str, Study] = {}


@dataclass(frozen=True)
class Study:
    """One claim of one paper, and the function that measures it."""

    name: str
    paper: Paper
    room: str
    claim: str
    measure: Callable[..., Finding]

    @property
    def finding(self) -> Finding | None:
        """What its last run found, or None before the first."""
        path = next(
            (folder / f"{self.name}.json" for folder in _shelves() if (folder / f"{self.name}.json").exists()), None
        )
        return Finding.load(path) if path else None

    def row(self) -> dict[str, Any]:
        """The line of `headwise study list --json`."""
        finding = self.finding
        return {
            "name": self.name,
            "paper": {"title": self.paper.title, "arxiv": self.paper.arxiv},
            "room": self.room,
            "claim": self.claim,
            "verdict": finding.verdict if finding else "unrun",
            "measured": finding.measured if finding else None,
        }


def study(
    name: str, *, paper: Paper, room: str, claim: str
) -> Callable[[Callable[..., Finding]], Callable[..., Finding]]:
    """Registers the decorated function, which itself stays an ordinary function."""
    if not name.isidentifier() or name != name.lower():
        raise HeadwiseError(f"study: a name is snake_case, as it becomes a file's name, got {name!r}.")
    if room not in ROOMS:
        raise HeadwiseError(f"room: wanted one of {', '.join(ROOMS)}, got {room!r}.")

    def register(measure: Callable[..., Finding]) -> Callable[..., Finding]:
        known = _REGISTERED.get(name)
        if known is not None and known.measure.__module__ != measure.__module__:
            raise HeadwiseError(f"study: {name!r} is already registered by {known.measure.__module__}.")
        _REGISTERED[name] = Study(name, paper, room, claim, measure)
        return measure

    return register


def studies() -> list[Study]:
    """Every study, sorted by room and name."""
    package = importlib.import_module("headwise.study")
    for module in pkgutil.iter_modules(package.__path__, "headwise.study."):
        importlib.import_module(module.name)
    return sorted(_REGISTERED.values(), key=lambda s: (ROOMS.index(s.room), s.name))


def get(name: str) -> Study:
    """The study of that name."""
    known = {s.name: s for s in studies()}
    if name not in known:
        raise HeadwiseError(
            f"study: there is none called {name!r}; `headwise study list` names the {len(known)} there are."
        )
    return known[name]


def run(name: str, **options: Any) -> Finding:
    """Runs a study, completes its finding with where and how it was measured, and stores it."""
    wanted = get(name)
    started = time.perf_counter()
    finding = wanted.measure(**options)
    if not isinstance(finding, Finding):
        raise HeadwiseError(f"study: {name!r} must return a Finding, got {type(finding).__name__}.")
    finding = dataclasses.replace(
        finding,
        hardware=finding.hardware or hardware(),
        versions=finding.versions or versions(),
        command=finding.command or f"headwise study run {name}",
        created=finding.created or datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=finding.seconds if finding.seconds is not None else round(time.perf_counter() - started, 1),
    )
    finding.save(evidence() / f"{name}.json")
    return finding


def evidence() -> Path:
    """Where findings are written: `evidence/` of the checkout headwise runs from, else the user's data folder."""
    checkout = _PACKAGE.parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "evidence").is_dir():
        return checkout / "evidence"
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "headwise" / "evidence"


def _shelves() -> list[Path]:
    """Where findings are looked for, first match wins."""
    return [evidence(), _PACKAGE / "evidence"]
