"""`headwise scan`: every question about every head, in one reading of the text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headwise.cli import scan_targets as targets
from headwise.cli.console import command_line, err, hush, out, print_json
from headwise.cli.texts import inputs_of, read_texts
from headwise.errors import HeadwiseError
from headwise.files import replacing

if TYPE_CHECKING:
    from headwise.scan import Scan

BEST = 5  # heads named per question in the table


def scan(
    model: Annotated[str, typer.Argument(help="zoo:llm, a hub id, a folder or a GGUF file.")] = "zoo:llm",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A text file to read; repeat for more. Without it: three chapters of a novel."),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="Names with commas between them. Without it: the core ones that fit the model.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Ask every question there is that fits the model.")] = False,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Read so many random tokens a text instead of all; gives standard errors.")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two models, checkpoints or saved scans (.nc, .zarr) side by side.", metavar="A B"),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Keep what is done in this file, and go on from it after a stop.")
    ] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the report: one HTML file.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the numbers: a .nc file or a .zarr folder.")] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="Write one column's scores as a head pattern; repeat for more.", metavar="COLUMN=FILE.json"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table of heads as JSON instead.")] = False,
    seed: Annotated[int, typer.Option(help="Of random tokens and sampled queries.")] = 0,
) -> None:
    """Ask what each attention head of a model does, and show the heads that do it most."""
    if every and questions:
        raise HeadwiseError(f"--questions {questions} and --all: give one of the two.")
    asked = "all" if every else questions.split(",") if questions else None
    texts = list(read_texts(text or []))
    shared = {"questions": asked, "queries": "all" if queries is None else queries, "seed": seed}
    if compare is not None:
        from headwise.cli.compare import compare_models

        targets.refuse_for_comparison(resume=resume, save=save, pattern=pattern)
        return compare_models(*compare, texts=texts, out_file=out_file, as_json=as_json, **shared)
    wanted = targets.check(out_file, save, pattern or [])
    hush()
    import headwise as hw

    targets.check_columns(wanted.patterns, asked)
    with err.status(f"opening {model}"):
        opened = hw.open_model(model)
    result = hw.scan.heads(
        opened,
        inputs=inputs_of(opened, texts),
        progress=True,
        checkpoint=resume,
        command=command_line(),
        **shared,
    )
    if out_file is not None:
        with replacing(out_file) as unfinished:
            result.to_html(unfinished)
    if save is not None:
        with replacing(save) as unfinished:
            result.save(unfinished)
    for column, path in wanted.patterns.items():
        targets.pattern_of(result, column).save(path)
    for question, reason in result.left_out.items():
        err.print(f"not asked: {question}: {reason}", style="dim", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        return print_json(rows(result))
    _print(result)
    for path in wanted.paths:
        out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def rows(result: Scan) -> list[dict[str, Any]]:
    """The table of heads as JSON rows; what was not measured for a head is null."""
    table = result.heads.astype(object)
    return table.where(table.notna(), None).to_dict("records")


def _print(result: Scan) -> None:
    many = result.heads["stream"].nunique() > 1
    table = Table(
        "question", "score", f"the {BEST} strongest heads", title=f"{len(result.heads)} heads", title_justify="left"
    )
    for question in result.payload()["questions"]:
        scores = result.heads[question["name"]]
        best = result.heads[scores.notna() & (scores != 0)].nlargest(BEST, question["name"])
        streams = best["stream"] + " " if many else [""] * len(best)
        heads = zip(streams, best["layer"], best["head"], best[question["name"]])
        named = [f"{stream}L{layer}.H{head} [dim]{score:.2f}[/]" for stream, layer, head, score in heads]
        table.add_row(question["title"], question["unit"], "  ".join(named) or "[dim]none[/]")
    out.print(table)
    roles = result.heads["role"].value_counts()
    out.print("Roles: " + ", ".join(f"{count} {role}" for role, count in roles.items()), markup=False)
