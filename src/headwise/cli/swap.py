"""`headwise swap`: the attention mechanisms there are, and how they learn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from headwise.cli.compare import rows as plain_rows
from headwise.cli.console import command_line, hush, out, print_json

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(name="swap", help="Attention mechanisms: list them, compare how they learn.", no_args_is_help=True)


@app.command("list")
def show(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Name every mechanism, what it does, its forms and its paper."""
    hush()
    from headwise.swap import MECHANISMS

    rows = [
        {
            "mechanism": name,
            "what": kind.what,
            "causal": kind.causal_too,
            "cross": kind.context_too,
            "paper": {"title": kind.paper.title, "arxiv": kind.paper.arxiv},
        }
        for name, kind in MECHANISMS.items()
    ]
    if as_json:
        return print_json(rows)
    table = Table("mechanism", "what it does", "causal", "cross", "paper")
    for row in rows:
        forms = ("yes" if row[form] else "no" for form in ("causal", "cross"))
        paper = f"{row['paper']['title']} ({row['paper']['arxiv']})"
        table.add_row(row["mechanism"], row["what"], *forms, paper)
    out.print(table)


@app.command("bench")
def run_bench(
    mechanisms: Annotated[
        str, typer.Option(help="Names, with settings after colons (sigmoid_attention:qk_norm=true), or all.")
    ] = "all",
    tasks: Annotated[str, typer.Option(help="Of lm, copy, recall, retrieve, images, relations.")] = "lm,recall",
    params: Annotated[str, typer.Option(help="matched: all as large as softmax attention; free: not.")] = "matched",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, from seeds 0, 1, ...")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Updates of a run.")] = 300,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-3,
    dim: Annotated[int, typer.Option(help="Width of the models, a multiple of 16 (the width of a head).")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the models.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")] = 1,
    out_file: Annotated[Path | None, typer.Option("--out", help="Results as JSON, written after every run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the file of --out.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Learning curves: .html, .png, .svg, .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a row a task and mechanism.")] = False,
) -> None:
    """Train small models around mechanisms, all alike and always beside softmax attention; print what they learned."""
    hush()
    from headwise.study.bench_plot import check_plot, plot
    from headwise.study.swap_bench import bench, summary

    if plot_file is not None:
        check_plot(plot_file)
    runs = bench(
        mechanisms, tasks, params=params, seeds=seeds, steps=steps, lr=lr, dim=dim, layers=layers, device=device,
        jobs=jobs, out=out_file, resume=resume, progress=True, command=command_line(),
    )  # fmt: skip
    found = summary(runs)
    if plot_file is not None:
        plot(runs, plot_file, command_line())
    if as_json:
        print_json(plain_rows(found))
    else:
        for task, group in found.groupby("task", sort=False):
            _print(str(task), group)
        out.print("Times and memory are of one training step. gain: against softmax attention, above 0 is better.")
        for path in filter(None, (out_file, plot_file)):
            out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    if runs["quality"].isna().all():
        raise typer.Exit(1)


def _print(task: str, group: pd.DataFrame) -> None:
    from headwise.study.bench_tasks import TASKS

    kind = TASKS[task]
    better = "higher" if kind.higher_is_better else "lower"
    out.print(f"\n[bold]{task}[/]: {kind.what}; {kind.metric}, {better} is better; chance {kind().chance:.3f}")
    table = Table("mechanism", "mean ± sd", "gain", "params", "ms", "cpu ms", "MB", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in group[group["seeds"] > 0].to_dict("records"):
        table.add_row(row["mechanism"], *cells(row))
    out.print(table)
    for row in group[group["note"] != ""].to_dict("records"):
        out.print(f"{row['mechanism']}: {row['note']}", markup=False, highlight=False)


def cells(row: dict[str, Any]) -> list[str]:
    spread = "" if row["seeds"] == 1 else f" ± {row['spread']:.3f}"
    numbers = [f"{row['quality']:.3f}{spread}", f"{row['gain']:+.3f}", f"{row['parameters']:,.0f}"]
    return [*numbers, *("-" if row[n] is None else f"{row[n]:.1f}" for n in ("step_ms", "processor_ms", "memory_mb"))]
