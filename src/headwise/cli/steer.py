"""`headwise steer`: the methods there are, what one does to a model's text, and one made ready on examples."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headwise.cli.console import err, hush, out, print_json
from headwise.cli.generate import PROMPT, SPANS, TOKENS, written
from headwise.errors import HeadwiseError
from headwise.files import check_writable

if TYPE_CHECKING:
    from headwise.steer import Method

app = typer.Typer(name="steer", help="Steering methods: list them, try one, calibrate one.", no_args_is_help=True)


@app.command("list")
def show(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Name every method, its settings with their defaults, and its paper."""
    hush()
    from headwise.steer import METHODS

    rows = [
        {
            "method": kind.__name__,
            "what": kind.what,
            "settings": {f.name: _plain(f.default) for f in fields(kind)},
            "paper": {"title": kind.paper.title, "arxiv": kind.paper.arxiv},
        }
        for kind in METHODS
    ]
    if as_json:
        return print_json(rows)
    table = Table("method", "what it does", "settings", "paper")
    for row in rows:
        settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        table.add_row(row["method"], row["what"], settings, f"{row['paper']['title']} ({row['paper']['arxiv']})")
    out.print(table)


@app.command("try")
def attempt(
    model: Annotated[str, typer.Argument(help="zoo:llm, a hub id, a folder or a GGUF file.")],
    method: Annotated[str, typer.Argument(help="A name that `headwise steer list` shows.")],
    prompt: PROMPT,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, a setting of the method; heads=FILE.json takes a head pattern."),
    ] = None,
    spans: SPANS = None,
    tokens: TOKENS = 48,
    save: Annotated[Path | None, typer.Option(help="Write the recipe: a .json file for `headwise generate`.")] = None,
) -> None:
    """Print what the model writes with a method and without it, side by side."""
    if save is not None:
        check_recipe(save)
    hush()
    import headwise as hw

    chosen = made(method, settings or [])
    with err.status(f"opening {model}"):
        opened = hw.open_model(model)
    plain, steered = (written(opened, prompt, spans or (), tokens, methods).strip() for methods in ((), (chosen,)))
    table = Table("without", f"with {type(chosen).__name__}")
    table.add_row(plain, steered)
    out.print(table, markup=False)
    if save is not None:
        path = hw.steer.Recipe.of(opened, chosen).save(save)
        out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


@app.command("calibrate")
def calibrated(
    model: Annotated[str, typer.Argument(help="zoo:llm, a hub id, a folder or a GGUF file.")],
    method: Annotated[str, typer.Argument(help="A name that `headwise steer list` shows.")],
    examples: Annotated[
        Path, typer.Option(help='JSON lines with "prompt" and "answer", and if wanted "options" and "segments".')
    ],
    save: Annotated[Path, typer.Option("--out", help="The recipe: a .json file for `headwise generate`.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, a setting to start from.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="NAME=[VALUE, ...], a setting to search, with values to try.")
    ] = None,
    given: Annotated[
        list[str] | None, typer.Option("--with", help="NAME=VALUE, an argument of the method's own calibrate.")
    ] = None,
) -> None:
    """Make a method ready on examples whose answers are known, and write its recipe."""
    check_recipe(save)
    hush()
    import headwise as hw

    chosen, solved = made(method, settings or []), hw.steer.read_examples(examples)
    space, options = named("--grid", grid), named("--with", given)
    if any(not isinstance(values, tuple) for values in space.values()):
        raise HeadwiseError("--grid: wanted NAME=[VALUE, ...], such as alpha=[1.0,0.1].")
    with err.status(f"opening {model}"):
        opened = hw.open_model(model)
    with err.status(f"calibrating on {len(solved)} examples"):
        ready = hw.steer.calibrate(opened, chosen, solved, grid=space or None, **options)
    path = hw.steer.Recipe.of(opened, ready).save(save)
    out.print(f"{shown(ready)}\nwrote {path}", markup=False, highlight=False, soft_wrap=True)


def check_recipe(path: Path) -> None:
    """Before anything long is run."""
    if path.suffix != ".json":
        raise HeadwiseError(f"{path}: wanted a name that ends in .json for the recipe.")
    check_writable(path)


def shown(method: Method) -> str:
    """A method with its settings, tensors by their shape."""
    values = {f.name: getattr(method, f.name) for f in fields(method)}
    said = [f"{name}={f'tensor {list(v.shape)}' if hasattr(v, 'shape') else repr(v)}" for name, v in values.items()]
    return f"{type(method).__name__}({', '.join(said)})"


def named(option: str, given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE settings as a mapping."""
    found = {}
    for setting in given or []:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise HeadwiseError(f"{option} {setting}: wanted NAME=VALUE.")
        found[key] = _value(value)
    return found


def made(name: str, settings: list[str]) -> Method:
    """The method with the settings of the command line."""
    from headwise.patterns import HeadPattern
    from headwise.steer.catalogue import find

    kind = find(name)
    known = [f.name for f in fields(kind)]
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, given = setting.partition("=")
        if not equals or key not in known:
            raise HeadwiseError(f"--set {setting}: wanted NAME=VALUE with one of {', '.join(known)}.")
        values[key] = HeadPattern.load(given) if key == "heads" and given.endswith(".json") else _value(given)
    wanted = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if wanted:
        raise HeadwiseError(
            f"{kind.__name__} cannot be made without {', '.join(f'--set {name}=...' for name in wanted)}."
        )
    return kind(**values)


def _value(given: str) -> Any:
    """A number, list or null as JSON has them; anything else is a name."""
    try:
        return _frozen(json.loads(given))
    except ValueError:
        return given


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A default as JSON; "wanted" where a setting has none."""
    if value is MISSING:
        return "wanted"
    return value if value is None or isinstance(value, str | int | float) else str(value)
