"""`headwise models`: the zoo of real small models that need no hub."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from headwise.cli.console import err, hush, out, print_json

app = typer.Typer(name="models", help="List the zoo of small real models, or fetch them ahead.")


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """List the zoo of small real models, or fetch them ahead."""
    if context.invoked_subcommand is None:
        list_models()


@app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Name every model of the zoo, and say whether it is here already."""
    from headwise.models.zoo import catalogue

    listed = catalogue()
    if as_json:
        rows = [{**vars(model), "folder": str(model.folder)} for model in listed]
        return print_json(rows)
    table = Table("name", "what", "licence", "download", "here", title="The zoo", title_justify="left")
    for model in listed:
        table.add_row(model.name, model.what, model.licence, f"{model.megabytes} MB", "yes" if model.cached else "no")
    out.print(table)
    out.print(
        "Fetched at first use, or ahead with `headwise models pull`. Any hub id, folder or GGUF file works as well.",
        markup=False,
    )


@app.command("pull")
def pull_models(
    name: Annotated[str | None, typer.Argument(help="One model, such as zoo:llm; without it, all.")] = None,
) -> None:
    """Fetch and convert one model of the zoo, or all of them, where that has not been done."""
    hush()
    from headwise.models.zoo import catalogue, find, pull

    wanted = [model.name for model in catalogue()] if name is None else [f"zoo:{find(name).name}"]
    for each in wanted:
        (folder,) = pull(each, progress=err.is_terminal)
        out.print(f"{each}  {folder}", markup=False, highlight=False, soft_wrap=True)
