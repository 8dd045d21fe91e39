"""What a scan found: labelled arrays, a table of heads, files and the report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.patterns import HeadPattern, HeadScore
from headwise.scan import roles
from headwise.scan.checkpoint import Found
from headwise.scan.details import Details, edges, sample_rows
from headwise.scan.passes import Plan
from headwise.scan.pool import pool
from headwise.scan.question import Prompt, Question

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1
PLACE = ("stream", "layer", "head")


class Scan:
    """`.data`: an xarray Dataset with dims stream, layer, head; a variable per column, its standard error
    `<column>_sem`, and the details of the report. Layers and heads a stream does not have are nan."""

    def __init__(self, data: xr.Dataset):
        self.data = data

    @property
    def about(self) -> dict[str, Any]:
        """The model, the questions, the sample sentence, and when."""
        return json.loads(str(self.data["about"].item()))

    @property
    def left_out(self) -> dict[str, str]:
        """Questions that were not asked, and why."""
        return self.about["left_out"]

    @cached_property
    def heads(self) -> pd.DataFrame:
        """A row per head: stream, layer, head, role, and a column per question."""
        columns = [column["name"] for column in self.about["columns"]]
        table = self.data[[*columns, "exists"]].to_dataframe().reset_index()
        table = table[table.pop("exists").astype(bool)]
        table = table.loc[:, [*PLACE, *columns]].sort_values(list(PLACE), kind="stable", ignore_index=True)
        order = {name: n for n, name in enumerate(self.data["stream"].values.tolist())}
        table = table.sort_values("stream", key=lambda s: s.map(order), kind="stable", ignore_index=True)
        table.insert(3, "role", roles.assign(table))
        return table

    def top(self, question: str, n: int = 10) -> pd.DataFrame:
        """The n heads with the highest score in a column, with its standard error where it is known."""
        if question not in self.heads or question in (*PLACE, "role"):
            known = ", ".join(column["name"] for column in self.about["columns"])
            raise HeadwiseError(f"top: there is no question {question!r} in this scan; there are {known}.")
        table = (
            self.heads[[*PLACE, "role", question]]
            .dropna(subset=[question])
            .sort_values(question, ascending=False, kind="stable")
        )
        table = table.head(n).reset_index(drop=True)
        if f"{question}_sem" in self.data:
            error = self.data[f"{question}_sem"]
            table["sem"] = [float(error.sel(stream=r.stream, layer=r.layer, head=r.head)) for r in table.itertuples()]
        return table

    def pattern(self, question: str) -> HeadPattern:
        """The scores of one column as a head pattern: a small file to share, compare and steer with."""
        table = self.top(question, len(self.heads))
        about = self.about
        column = next(c for c in about["columns"] if c["name"] == question)
        return HeadPattern(
            question=question,
            paper=column["paper"],
            model=about["model"]["name"],
            fingerprint=about["model"]["fingerprint"],
            seed=about["seed"],
            created=about["created"],
            versions=about["versions"],
            heads=tuple(
                HeadScore(stream=r.stream, layer=r.layer, head=r.head, score=score)
                for r, score in zip(table.itertuples(), table[question].astype(float), strict=True)
            ),
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As netCDF (`.nc`) or Zarr (`.zarr`), replaced whole or not at all."""
        path = Path(path)
        if path.suffix not in (".nc", ".zarr"):
            raise HeadwiseError(f"save: wanted a name that ends in .nc or .zarr; got {str(path)!r}.")
        with replacing(path) as unfinished:
            if path.suffix == ".nc":
                self.data.to_netcdf(unfinished, engine="h5netcdf")
            else:
                need_zarr()
                # Zarr's third format has no settled way to store text yet; the second does.
                self.data.to_zarr(unfinished, mode="w", zarr_format=2, consolidated=False)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scan:
        """A scan that `save` wrote."""
        path = Path(path)
        if path.suffix not in (".nc", ".zarr") or not path.exists():
            raise HeadwiseError(f"load: wanted an existing .nc or .zarr file of a scan; got {str(path)!r}.")
        if path.suffix == ".zarr":
            need_zarr()
        try:
            if path.suffix == ".nc":
                data = xr.load_dataset(path, engine="h5netcdf")
            else:
                data = xr.open_zarr(path, consolidated=False).load()
        except Exception as error:
            raise HeadwiseError(f"load: {path} cannot be read as a scan ({error}).") from error
        if data.attrs.get("headwise_scan") != FORMAT:
            raise HeadwiseError(
                f"load: {path} is not a scan of this version of headwise; make it again with scan.heads."
            )
        return cls(data)

    def payload(self) -> dict[str, Any]:
        """Everything the report shows, as plain JSON data."""
        from headwise.scan.payload import payload

        return payload(self)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report: one file that needs no network."""
        # The studio stands above this room: it is looked up when it is asked for, and never needed to scan.
        from headwise.studio import write_report

        write_report(self.payload(), path)
        return Path(path)

    def plot(self, question: str, heads: Sequence[tuple[int, int]] | None = None, stream: str | None = None) -> Figure:
        """A Matplotlib figure of a column (layers by heads) or of a profile (curves, or a map of colours), as small as
        a paper prints it. `heads` draws a profile's curves of these (layer, head) pairs."""
        from headwise.scan.plot import plot

        return plot(self, question, heads, stream)

    def _repr_html_(self) -> str:
        from headwise.scan.notebook import scan_html

        return scan_html(self)

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{s}: {int(self.data['exists'].sel(stream=s).sum())} heads" for s in self.data["stream"].values
        )
        return f"Scan({self.about['model']['name']}; {sizes}; {', '.join(self.about['questions'])})"


def assemble(
    plan: Plan,
    questions: Sequence[Question],
    done: dict[int, Found],
    prompts: Sequence[Prompt],
    left_out: dict[str, str],
    lenient: bool,
    seed: int = 0,
    command: str = "",
) -> Scan:
    """Averages what the passes showed, lets every question score it, and lays everything out by stream, layer and head.

    `lenient`: a question nobody asked for by name that fails on what it saw is left out, with its reason."""
    opened = plan.opened
    grid = Grid([(site.stream, site.layer, site.heads) for site in opened.sites])
    columns: list[dict[str, Any]] = []
    names: list[str] = []
    profiles: dict[str, xr.DataArray] = {}
    for question in questions:
        parts = {stream: pool(seen) for stream, seen in _collect(plan, done, question).items()}
        try:
            if not parts:
                raise HeadwiseError(f"{question.name}: there was nothing for it to read in these inputs.")
            scores = {stream: _score(question, seen) for stream, seen in parts.items()}
            curves = {stream: question.profiles(seen) for stream, seen in parts.items()}
        except HeadwiseError as error:
            if not lenient:
                raise
            left_out[question.name] = str(error)
            continue
        names.append(question.name)
        for name in dict.fromkeys(name for found in curves.values() for name in found):
            arrays = [found[name].expand_dims(stream=[stream]) for stream, found in curves.items() if name in found]
            profiles[name] = xr.concat(arrays, "stream", join="outer")
            taken = {*profiles[name].dims, name} & {*grid.data, *known_columns(questions)}
            if taken:
                raise HeadwiseError(
                    f"{question.name}: its profile {name!r} uses the name of a column, {taken.pop()!r}."
                )
        for column in question.columns():
            found = {stream: score[column.name] for stream, score in scores.items() if column.name in score}
            if not found:
                continue
            if column.name in grid.data:
                raise HeadwiseError(f"questions: two of them have a column {column.name!r}; ask them in two scans.")
            grid.put(column.name, found)
            grid.put(
                f"{column.name}_sem",
                {s: x[f"{column.name}_sem"] for s, x in scores.items() if f"{column.name}_sem" in x},
            )
            columns.append({"question": question.name, "paper": asdict(question.paper), **asdict(column)})
    details = next((q for p in plan.passes for q in p.questions if isinstance(q, Details)), None)
    if details is not None:
        seen = {stream: pool(values) for stream, values in _collect(plan, done, details).items()}
        grid.put("detail_entropy", {s: x["entropy"] for s, x in seen.items()})
        grid.put("detail_bins", {s: x["bins"] for s, x in seen.items() if "bins" in x}, "bin")
        grid.put("detail_mass", {s: x["mass"] for s, x in seen.items() if "mass" in x}, "segment")
    about: dict[str, Any] = {
        "model": {
            "name": opened.name,
            "fingerprint": opened.fingerprint,
            "parameters": sum(p.numel() for p in opened.model.parameters()),
        },
        "versions": {package: version(package) for package in ("headwise", "torch", "transformers")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens": plan.tokens,
        "passes": len(plan.passes),
        "edges": edges(details.tokens) if details is not None else [],
        "seed": seed,
        "command": command,
        "questions": names,
        "profiles": list(profiles),
        "columns": columns,
        "left_out": left_out,
        "sample": None,
    }
    data = xr.merge([grid.dataset(), xr.Dataset(profiles)], join="outer", compat="no_conflicts")
    if prompts and columns:
        about["sample"] = sample_rows(opened, prompts[0], notable(data, [c["name"] for c in columns]))
    data["about"] = json.dumps(about)
    return Scan(data.assign_attrs(headwise_scan=FORMAT))


def known_columns(questions: Sequence[Question]) -> set[str]:
    return {column.name for question in questions for column in question.columns()}


def need_zarr() -> None:
    if find_spec("zarr") is None:
        raise HeadwiseError("A .zarr file needs the zarr package: pip install 'headwise[zarr]', or use a name in .nc.")


def notable(
    data: xr.Dataset, columns: Sequence[str], each: int = 2, most: int = 40
) -> dict[str, list[tuple[int, int]]]:
    """The heads whose rows the report shows: in every stream the highest of every column, then the second of every
    column, up to `most` heads."""
    chosen: dict[str, list[tuple[int, int]]] = {}
    for stream in data["stream"].values.tolist():
        best = []
        for column in columns:
            score = data[column].sel(stream=stream).stack(place=("layer", "head")).dropna("place")
            order = np.argsort(-score.values, kind="stable")[:each]
            best.append([(int(layer), int(head)) for layer, head in score["place"].values[order]])
        ranked = [places[rank] for rank in range(each) for places in best if len(places) > rank]
        if ranked:
            chosen[stream] = sorted(list(dict.fromkeys(ranked))[:most])
    return chosen


def _collect(plan: Plan, done: dict[int, Found], question: Question) -> dict[str, list[xr.Dataset]]:
    parts: dict[str, list[xr.Dataset]] = {}
    for number, one in enumerate(plan.passes):
        for place, asked in enumerate(one.questions):
            if asked is question:
                for stream, values in done[number][place].items():
                    parts.setdefault(stream, []).append(values)
    return parts


def _score(question: Question, values: xr.Dataset) -> dict[str, xr.DataArray]:
    score = question.score(values)
    return {question.name: score} if isinstance(score, xr.DataArray) else dict(score)


class Grid:
    """Arrays of stream x layer x head, as large as the largest stream."""

    def __init__(self, sizes: Sequence[tuple[str, int, int]]):
        self.streams = list(dict.fromkeys(stream for stream, _, _ in sizes))
        self.layers = 1 + max(layer for _, layer, _ in sizes)
        self.heads = max(heads for _, _, heads in sizes)
        exists = np.zeros((len(self.streams), self.layers, self.heads), dtype=bool)
        for stream, layer, heads in sizes:
            exists[self.streams.index(stream), layer, :heads] = True
        self.data: dict[str, Any] = {"exists": (PLACE, exists)}
        self.coords: dict[str, Any] = {
            "stream": self.streams,
            "layer": np.arange(self.layers),
            "head": np.arange(self.heads),
        }

    def put(self, name: str, found: dict[str, xr.DataArray], extra: str | None = None) -> None:
        """Adds a variable from one array per stream; `extra` is a dim after layer and head."""
        if not found:
            return
        labels = (
            list(dict.fromkeys(x for array in found.values() for x in array[extra].values.tolist())) if extra else []
        )
        full = np.full(
            (len(self.streams), self.layers, self.heads, *([len(labels)] if extra else [])), np.nan, dtype=np.float32
        )
        for stream, array in found.items():
            order = ("layer", "head", *([extra] if extra else []))
            values = array.transpose(*order).values
            index = np.ix_(array["layer"].values.astype(int), array["head"].values.astype(int))
            target = full[self.streams.index(stream)]
            if extra:
                for place, label in enumerate(array[extra].values.tolist()):
                    target[(*index, labels.index(label))] = values[..., place]
            else:
                target[index] = values
        if extra:
            self.coords[extra] = labels
        self.data[name] = ((*PLACE, *([extra] if extra else [])), full)

    def dataset(self) -> xr.Dataset:
        return xr.Dataset(self.data, self.coords)
