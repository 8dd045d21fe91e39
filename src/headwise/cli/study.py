"""`headwise study`: the claims of the papers, measured here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from headwise.cli.console import hush, out, print_json

if TYPE_CHECKING:
    from headwise.study import Finding, Study

app = typer.Typer(name="study", help="Claims of papers, measured here: list, run, show.", no_args_is_help=True)
COLOURS = {"holds": "green", "fails": "red", "untestable": "yellow", "unrun": "dim"}


@app.command("list")
def list_studies(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Every study with its verdict; `unrun` before its first run."""
    hush()
    from headwise.study import studies

    rows = [study.row() for study in studies()]
    if as_json:
        return print_json(rows)
    table = Table("name", "room", "verdict", "claim", "paper")
    for row in rows:
        colour = COLOURS[row["verdict"]]
        paper = f"{row['paper']['title']} ({row['paper']['arxiv']})" if row["paper"]["arxiv"] else row["paper"]["title"]
        table.add_row(row["name"], row["room"], f"[{colour}]{row['verdict']}[/]", row["claim"], paper)
    out.print(table if rows else "No studies are registered yet.")


@app.command("run")
def run_study(name: Annotated[str, typer.Argument(help="A name from `headwise study list`.")]) -> None:
    """Measure the claim, print the finding and store it. Exit code 1 when the claim fails here."""
    hush()
    from headwise import study

    with out.status(f"running {name}"):
        finding = study.run(name)
    _print(study.get(name), finding)
    out.print(f"stored in {study.evidence() / name}.json", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if finding.verdict == "fails" else 0)


@app.command("show")
def show_study(name: Annotated[str, typer.Argument(help="A name from `headwise study list`.")]) -> None:
    """Print what a study claims and what its last run found."""
    hush()
    from headwise.study import get

    study = get(name)
    _print(study, study.finding)


def _print(study: Study, finding: Finding | None) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {"study": study.name, "claim": study.claim, "paper": f"{study.paper.title} {study.paper.url}"}
    if finding is None:
        rows["verdict"] = f"unrun: `headwise study run {study.name}` measures it"
    else:
        rows |= {"expected": finding.expected, "verdict": finding.verdict, "reason": finding.reason}
        rows |= {f"measured {key}": str(value) for key, value in finding.measured.items()}
        seeds = ", ".join(map(str, finding.seeds)) or "none"
        rows |= {"model": finding.model, "seeds": seeds, "hardware": finding.hardware, "command": finding.command}
        rows["versions"] = ", ".join(f"{package} {version}" for package, version in finding.versions.items())
        rows["run at"] = f"{finding.created}, took {finding.seconds} s"
    for label, text in rows.items():
        table.add_row(label, text)
    out.print(table, markup=False)
