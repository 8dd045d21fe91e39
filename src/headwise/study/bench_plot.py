"""Learning curves of a swap bench: a panel a task, a line a mechanism, a band from the worst to the best seed."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.files import check_writable, replacing
from headwise.study.bench_specs import BASELINE
from headwise.study.bench_tasks import TASKS
from headwise.study.swap_bench import summary

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".html", ".png", ".svg", ".pdf")
LINES = ("-", "--", ":", "-.")


def check_plot(path: str | Path) -> Path:
    """The path, when such a picture can be drawn and written: to be asked before the work."""
    path = check_writable(path)
    if path.suffix not in SUFFIXES:
        raise HeadwiseError(f"plot: a file that ends in {', '.join(SUFFIXES)}; got {path.name}.")
    need("matplotlib", "analysis")
    return path


def plot(runs: pd.DataFrame, path: str | Path, title: str = "") -> Path:
    """Writes the picture; as .html a page of its own, with the numbers below the curves."""
    path = check_plot(path)
    figure = drawn(runs)
    with replacing(path) as unfinished:
        if path.suffix != ".html":
            figure.savefig(unfinished, dpi=150)
            return path
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
        picture = svg.getvalue()[svg.getvalue().index("<svg") :]
        table = summary(runs).round(4).to_html(index=False, na_rep="", border=0)
        head = f'<!doctype html><meta charset="utf-8"><title>Learning curves</title><style>{STYLE}</style>'
        unfinished.write_text(f"{head}<h1>Learning curves</h1><p>{escape(title)}</p>{picture}{table}", encoding="utf-8")
    return path


STYLE = "body{font:14px sans-serif;margin:2em}svg{max-width:100%;height:auto}td,th{padding:2px 10px;text-align:right}"


def drawn(runs: pd.DataFrame) -> Any:
    figure_class = need("matplotlib.figure", "analysis").Figure
    learned = runs.dropna(subset="quality")
    tasks, names = list(dict.fromkeys(learned["task"])), list(dict.fromkeys(learned["mechanism"]))
    figure = figure_class(figsize=(4.4 * max(1, len(tasks)), 3.6 + 0.12 * len(names)), layout="constrained")
    shown = {}
    for axes, task in zip(np.atleast_1d(figure.subplots(1, max(1, len(tasks)))), tasks):
        kind = TASKS[task]
        for name, group in learned[learned["task"] == task].groupby("mechanism", sort=False):
            curves = np.array(group["curve"].tolist())  # seed, point, (step, quality)
            steps, values, place = curves[0, :, 0], curves[:, :, 1], names.index(name)
            how = {"color": "black", "linewidth": 2.2} if name == BASELINE else {
                "color": f"C{(place - 1) % 10}", "linestyle": LINES[(place - 1) // 10 % len(LINES)]}  # fmt: skip
            (shown[name],) = axes.plot(steps, values.mean(0), **how)
            axes.fill_between(steps, values.min(0), values.max(0), color=how["color"], alpha=0.12, linewidth=0)
        axes.axhline(kind().chance, color="grey", linewidth=0.8, linestyle=":")
        better = "higher" if kind.higher_is_better else "lower"
        axes.set(
            title=f"{task}: {kind.what}".replace(", ", ",\n"),
            xlabel="step",
            ylabel=f"{kind.metric} ({better} is better)",
        )
        axes.title.set_fontsize(9)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(4, len(shown) or 1), fontsize=8)
    return figure
