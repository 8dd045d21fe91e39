"""`headwise scan`: every question about every head, in one reading of the text."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headwise.cli.console import err, hush, out, print_json
from headwise.errors import HeadwiseError
from headwise.files import check_writable, replacing

if TYPE_CHECKING:
    from headwise.models import Opened
    from headwise.scan import Scan

BEST = 5  # heads named per question in the table


def scan(
    model: Annotated[str, typer.Argument(help="zoo:llm, a hub id, a folder or a GGUF file.")] = "zoo:llm",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A text file to read; repeat for more. Without it: three chapters of a novel."),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="Names with commas between them. Without it: all that fit the model.")
    ] = None,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Read so many random tokens a text instead of all; gives standard errors.")
    ] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the report: one HTML file.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the numbers: a .nc file or a .zarr folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table of heads as JSON instead.")] = False,
    seed: Annotated[int, typer.Option(help="Of random tokens and sampled queries.")] = 0,
) -> None:
    """Ask what each attention head of a model does, and show the heads that do it most."""
    targets = [check_writable(path) for path in (out_file, save) if path is not None]
    if save is not None and save.suffix not in (".nc", ".zarr"):
        raise HeadwiseError(f"--save {save}: wanted a name that ends in .nc (one file) or .zarr (a folder).")
    texts = list(read_texts(text or []))
    hush()
    import headwise as hw

    with err.status(f"opening {model}"):
        opened = hw.open_model(model)
    result = hw.scan.heads(
        opened,
        inputs=[encode(opened, name, words) for name, words in texts] or default_inputs(opened),
        questions=questions.split(",") if questions else None,
        queries="all" if queries is None else queries,
        seed=seed,
        progress=True,
    )
    if out_file is not None:
        with replacing(out_file) as unfinished:
            result.to_html(unfinished)
    if save is not None:
        with replacing(save) as unfinished:
            result.save(unfinished)
    if as_json:
        return print_json(rows(result))
    _print(result)
    for path in targets:
        out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def read_texts(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Name and contents of every file, before anything slow is begun."""
    for path in paths:
        try:
            words = path.read_text(encoding="utf-8")
        except OSError as error:
            raise HeadwiseError(f"--text {path}: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise HeadwiseError(f"--text {path} is not UTF-8 text: convert it first.") from None
        if not words.strip():
            raise HeadwiseError(f"--text {path} is empty: give a file with at least one word.")
        yield str(path), words


def encode(opened: Opened, name: str, words: str) -> dict[str, Any]:
    """Model inputs, or an error that names the file."""
    try:
        return opened.encode(words)
    except HeadwiseError as error:
        raise HeadwiseError(f"--text {name}: {error}") from None


def default_inputs(opened: Opened) -> list[dict[str, Any]]:
    """The text headwise ships, a chapter an input, each cut to what the model can place."""
    if opened.tokenizer is None or getattr(opened.model, "main_input_name", "input_ids") != "input_ids":
        raise HeadwiseError(
            f"{opened.name} does not read text: from Python, headwise.scan.heads(opened, inputs=[opened.encode(...)]) "
            "scans it on pictures or sound."
        )
    prose = files("headwise.scan").joinpath("assets/prose.txt").read_text(encoding="utf-8")
    chapters = [chapter.strip() for chapter in prose.split("Chapter ") if chapter.strip()]
    limit = {} if opened.max_positions is None else {"truncation": True, "max_length": opened.max_positions}
    return [opened.encode(chapter, **limit) for chapter in chapters]


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
