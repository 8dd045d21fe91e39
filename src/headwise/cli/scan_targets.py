"""What a scan writes, checked before the work begins: the report, the numbers, head patterns."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.errors import HeadwiseError
from headwise.files import check_writable

if TYPE_CHECKING:
    from headwise.patterns import HeadPattern
    from headwise.scan import Scan


@dataclass(frozen=True)
class Targets:
    paths: list[Path]
    patterns: dict[str, Path]
    """Column -> file."""


def check(out_file: Path | None, save: Path | None, patterns: list[str]) -> Targets:
    """The files to write, all in folders that are there and with names that say their format."""
    found: dict[str, Path] = {}
    for given in patterns:
        column, sign, name = given.partition("=")
        if not sign or not column or not name.endswith(".json"):
            raise HeadwiseError(f"--pattern {given}: wanted COLUMN=FILE.json, such as induction_heads=induction.json.")
        found[column] = Path(name)
    paths = [path for path in (out_file, save, *found.values()) if path is not None]
    for path in paths:
        check_writable(path)
    if save is not None and save.suffix not in (".nc", ".zarr"):
        raise HeadwiseError(f"--save {save}: wanted a name that ends in .nc (one file) or .zarr (a folder).")
    return Targets(paths, found)


def check_columns(patterns: dict[str, Path], asked: list[str] | str | None) -> None:
    """Every column is one of the questions that are asked."""
    from headwise.scan import CORE, QUESTIONS

    kinds = CORE if asked is None else QUESTIONS
    questions = [kind() for kind in kinds if not isinstance(asked, list) or kind().name in asked]
    known = [column.name for question in questions for column in question.columns()]
    for column in patterns:
        if column not in known:
            near = ", ".join(get_close_matches(column, known)) or ", ".join(known)
            raise HeadwiseError(f"--pattern {column}=...: the questions asked have no such column; there are {near}.")


def pattern_of(result: Scan, column: str) -> HeadPattern:
    """The pattern, or why the question was not asked of this model in the end."""
    if column not in result.heads:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in result.left_out.items())
        raise HeadwiseError(f"--pattern {column}=...: this scan has no such column. Not asked: {reasons}")
    return result.pattern(column)


def refuse_for_comparison(**given: object) -> None:
    """Options that are about one scan; two have none of them."""
    for name, value in given.items():
        if value:
            raise HeadwiseError(f"--{name} is about one scan: leave it out with --compare, or scan the models singly.")
