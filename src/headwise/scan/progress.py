"""Telling how far a scan is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, int, str], None]
"""Called with passes done, passes in all, and what is done next."""


@contextmanager
def reporting(progress: bool | Report | None, plan: object, total: int) -> Iterator[Report]:
    """True: the cost, then a bar on the error stream; a function: called after every pass; None or False: silence."""
    if callable(progress):
        progress(0, total, str(plan))
        yield progress
    elif progress:
        console = Console(stderr=True)
        console.print(str(plan))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("scan", total=total)
            yield lambda done, _total, note: bar.update(task, completed=done, description=note)
    else:
        yield lambda _done, _total, _note: None
