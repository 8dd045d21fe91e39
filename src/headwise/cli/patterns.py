"""`headwise patterns`: head patterns, the small files that say which heads do something."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headwise.cli.console import out, print_json

if TYPE_CHECKING:
    import pandas as pd

    from headwise.patterns import HeadPattern

app = typer.Typer(name="patterns", help="Head patterns: show one, or the difference of two.", no_args_is_help=True)
MOST = Annotated[int, typer.Option("--top", min=1, help="So many heads.")]
AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON: every head.")]


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="Written by `headwise scan --pattern COLUMN=FILE.json`.")],
    top: MOST = 20,
    as_json: AS_JSON = False,
) -> None:
    """Say where a pattern comes from, and name its highest heads."""
    from headwise.patterns import HeadPattern

    pattern = HeadPattern.load(file)
    if as_json:
        return print_json(pattern.model_dump())
    out.print(about(pattern), markup=False, highlight=False, soft_wrap=True)
    _print(pattern.table.head(top), {"score": "score"})


@app.command("diff")
def diff(
    one: Annotated[Path, typer.Argument(help="A pattern.")],
    other: Annotated[Path, typer.Argument(help="Another, of the same model or not.")],
    top: MOST = 20,
    as_json: AS_JSON = False,
) -> None:
    """Put the heads of two patterns side by side, the largest change first."""
    from headwise.patterns import HeadPattern

    first, second = HeadPattern.load(one), HeadPattern.load(other)
    table = first.diff(second)
    if as_json:
        return print_json(rows(table))
    for name, pattern in ((one, first), (other, second)):
        out.print(f"{name.name}: {about(pattern)}", markup=False, highlight=False, soft_wrap=True)
    agreement = table[["score", "score_other"]].corr(method="pearson").iloc[0, 1]
    out.print(f"correlation of the scores over {table['change'].notna().sum()} shared heads: {agreement:.3f}")
    _print(table.head(top), {"score": one.stem, "score_other": other.stem, "change": "change"})


def about(pattern: HeadPattern) -> str:
    made = ", ".join(f"{package} {version}" for package, version in pattern.versions.items())
    seed = "" if pattern.seed is None else f", seed {pattern.seed}"
    return (
        f"{pattern.question} of {len(pattern.heads)} heads in {pattern.model} ({pattern.fingerprint}){seed}, "
        f"{pattern.created or 'no date'}{', ' + made if made else ''}"
    )


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    plain = table.astype(object)
    return plain.where(plain.notna(), None).to_dict("records")


def _print(heads: pd.DataFrame, columns: dict[str, str]) -> None:
    many = heads["stream"].nunique() > 1
    table = Table("head", *columns.values())
    for row in heads.to_dict("records"):
        place = f"{row['stream']} " * many + f"L{row['layer']}.H{row['head']}"
        table.add_row(place, *("-" if row[name] != row[name] else f"{row[name]:.4f}" for name in columns))
    out.print(table)
