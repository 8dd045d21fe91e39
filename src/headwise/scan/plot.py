"""Figures a paper could print, with Matplotlib (the extra `analysis`): grids of heads, and a question's curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.scan.colours import COOL, NOTHING, SIGNED, limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from headwise.scan.result import Scan

STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "savefig.bbox": "tight",
         "pdf.fonttype": 42, "svg.fonttype": "none", "axes.linewidth": 0.6, "legend.frameon": False}  # fmt: skip
CURVES = 8
"""Up to so many curves stand in one panel; more are drawn as a map of colours."""


def plot(scan: Scan, name: str, heads: Sequence[tuple[int, int]] | None = None, stream: str | None = None) -> Figure:
    """The figure of a column (layers by heads, one panel a stream) or of a profile.

    A profile with one dim is a curve, with two a map of colours (or curves where one dim has few values). One that has
    layer and head is averaged over heads, or drawn for the (layer, head) pairs in `heads`. `stream` picks one.

    >>> result.plot("induction_heads").savefig("induction.pdf")
    """
    known = [column["name"] for column in scan.about["columns"]]
    profiles = scan.about.get("profiles", [])
    if name not in known and name not in profiles:
        raise HeadwiseError(
            f"plot: there is no {name!r} in this scan; columns are {', '.join(known)}; profiles are "
            f"{', '.join(profiles) or 'none'}."
        )
    values = scan.data[name]
    streams = [s for s in values["stream"].values.tolist() if values.sel(stream=s).notnull().any()]
    if stream is not None:
        if stream not in streams:
            raise HeadwiseError(f"stream: {name} is known for {', '.join(streams)}; got {stream!r}.")
        streams = [stream]
    if not streams:
        raise HeadwiseError(f"plot: {name} has no value for any head of this scan.")
    pyplot = need("matplotlib.pyplot", "analysis")
    panels = {s: panel(values.sel(stream=s, drop=True), heads) for s in streams}
    shapes = [size(values, name in known) for values in panels.values()]
    inches = (sum(wide for wide, _ in shapes), max(high for _, high in shapes))
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(panels), squeeze=False, layout="constrained", figsize=inches)
        column = next((c for c in scan.about["columns"] if c["name"] == name), None)
        for axis, (called, shown) in zip(axes[0], panels.items(), strict=True):
            draw(figure, axis, shown, column or {"title": name, "unit": "", "threshold": None})
            if len(panels) > 1:
                axis.set_title(called)
        figure.suptitle(column["title"] if column else name.replace("_", " "), fontsize=9)
        pyplot.close(figure)  # shown once, where it is the value of a cell
    return figure


def panel(values: xr.DataArray, heads: Sequence[tuple[int, int]] | None) -> xr.DataArray:
    """What one panel shows: one or two dims, in drawing order (across last)."""
    for dim in values.dims:
        values = values.dropna(dim, how="all")
    if {"layer", "head"} == set(values.dims):
        return values.transpose("head", "layer")
    if {"layer", "head"} <= set(values.dims):
        if heads is None:
            values = values.mean("head")
        else:
            chosen = [values.sel(layer=layer, head=head, drop=True) for layer, head in heads]
            names = [f"L{layer}.H{head}" for layer, head in heads]
            values = xr.concat(chosen, "of").assign_coords(of=names)
    elif heads is not None:
        raise HeadwiseError(
            f"heads: {values.name} has no value a head; its dims are {', '.join(map(str, values.dims))}."
        )
    if not 1 <= values.ndim <= 2:
        dims = ", ".join(map(str, values.dims)) or "none"
        raise HeadwiseError(f"plot: {values.name} has dims {dims}: choose some of it from Scan.data and plot that.")
    if values.ndim == 2 and values.dims[-1] in ("layer", "of"):
        values = values.transpose()
    return values


def size(values: xr.DataArray, heads: bool) -> tuple[float, float]:
    """Inches: as wide as a column of a paper, wider where there are many layers."""
    if not heads or values.ndim == 1:
        return 3.4, 2.4
    down, across = values.shape
    return max(3.0, 1.0 + 0.17 * across), max(1.6, 0.9 + 0.17 * down)


def draw(figure: Any, axis: Any, values: xr.DataArray, column: dict[str, Any]) -> None:
    curves = values.ndim == 1 or ("of" in values.dims) or ("head" not in values.dims and values.shape[0] <= CURVES)
    if curves:
        return draw_curves(axis, values, column)
    down, across = values.dims
    low, high = limits(values.values)
    colours = need("matplotlib.colors", "analysis")
    scale = colours.LinearSegmentedColormap.from_list("scores", SIGNED if low < 0 < high else COOL)
    scale = scale.with_extremes(bad=NOTHING)
    picture = axis.imshow(
        np.ma.masked_invalid(values.values), cmap=scale, vmin=low, vmax=high, aspect="auto", interpolation="none"
    )
    ticks(axis.xaxis, values[across].values)
    ticks(axis.yaxis, values[down].values)
    axis.set(xlabel=across, ylabel=down)
    bar = figure.colorbar(picture, ax=axis, label=column["unit"], pad=0.02)
    bar.outline.set_linewidth(0.4)
    if column["threshold"] is not None and low < column["threshold"] < high:
        bar.ax.axhline(column["threshold"], color="black", linewidth=0.8, linestyle="--")


def draw_curves(axis: Any, values: xr.DataArray, column: dict[str, Any]) -> None:
    lines = [values] if values.ndim == 1 else [values.isel({values.dims[0]: n}) for n in range(values.shape[0])]
    across = values.dims[-1]
    places = values[across].values
    numbers = np.issubdtype(places.dtype, np.number)
    for line in lines:
        name = None if values.ndim == 1 else str(line[values.dims[0]].item())
        axis.plot(places if numbers else range(len(places)), line.values, linewidth=1.1, label=name)
    if not numbers:
        ticks(axis.xaxis, places)
    axis.set(xlabel=across, ylabel=column["unit"])
    if values.ndim == 2:
        title = None if values.dims[0] == "of" else values.dims[0]
        axis.legend(title=title, fontsize=7, title_fontsize=7, ncols=1 + (len(lines) > 4))


def ticks(axis: Any, names: np.ndarray, most: int = 11) -> None:
    """Every n-th name, n a round number."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**6) if len(names) / n <= most)
    shown = range(0, len(names), every)
    axis.set_ticks(list(shown), [f"{names[i]:.4g}" if isinstance(names[i], float) else str(names[i]) for i in shown])
