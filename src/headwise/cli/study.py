"""`headwise study`: the claims of the papers, measured here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from headwise.cli.console import err, hush, out, print_json
from headwise.errors import HeadwiseError

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


@app.command("evaluate")
def evaluate_steered(
    model: Annotated[str, typer.Argument(help="zoo:llm, a hub id, a folder or a GGUF file.")],
    task: Annotated[
        str, typer.Option(help="documents, key_values, sentiment, topic, ioi or coloured_objects.")
    ] = "documents",
    steer: Annotated[Path | None, typer.Option(help="A recipe that `headwise steer try --save` wrote.")] = None,
    count: Annotated[int, typer.Option(min=2, help="How many examples.")] = 40,
    seed: Annotated[int, typer.Option(help="Another seed makes other examples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer a task plain and steered: accuracy, log-probability of the right answer, and the change of each."""
    hush()
    import headwise as hw
    from headwise.study import tasks
    from headwise.study.evaluate import PLAIN, difference, evaluate, interval

    made = {make.__name__: make for make in tasks.TASKS}
    if task not in made:
        raise HeadwiseError(f"--task {task}: wanted one of {', '.join(made)}.")
    recipe = None if steer is None else hw.steer.Recipe.load(steer)
    with err.status(f"opening {model}"):
        opened = hw.open_model(model)
    if recipe is not None:
        recipe.check(opened)
    with err.status(f"answering {count} examples of {task}"):
        found = evaluate(opened, made[task](seed, count), {} if recipe is None else {"steered": recipe.methods})
    rows = []
    for setting, group in found.groupby("setting", sort=False):
        for measure in ("right", "logp"):
            change = None if setting == PLAIN else difference(found, str(setting), measure)._asdict()
            mean = interval(group[measure].to_numpy())._asdict()
            rows.append({"setting": setting, "measure": measure, **mean, "change": change})
    if as_json:
        return print_json(rows)
    table = Table("", "measure", "mean (95%)", "change (95%)")
    for row in rows:
        table.add_row(row["setting"], row["measure"], _spread(row), _spread(row["change"]) if row["change"] else "")
    out.print(table)


def _spread(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


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
