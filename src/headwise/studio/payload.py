"""The data behind the report, version 1, checked before it is drawn. Only what these models name gets into the file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError

from headwise.errors import HeadwiseError

Grid = list[list[FiniteFloat | None]]
Name = Annotated[str, Field(min_length=1)]
PLACE = re.compile(r"(.+):(\d+):(\d+)")


class Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Model(Part):
    name: Name
    fingerprint: str = ""
    parameters: NonNegativeInt | None = None
    headwise: str = ""


class Stream(Part):
    name: Name
    layers: list[NonNegativeInt] = Field(min_length=1)
    heads: PositiveInt


class Paper(Part):
    title: str
    arxiv: Annotated[str, Field(pattern=r"^([\w.-]+/)?[\w.]*$")] = ""


class Question(Part):
    name: Name
    question: str = ""
    """The question the column belongs to: columns of one question stand together."""
    title: str = ""
    what: str = ""
    paper: Paper | None = None
    unit: str = ""
    threshold: FiniteFloat | None = None
    higher: str = ""
    grid: dict[str, Grid]
    sem: dict[str, Grid] | None = None


class Distance(Part):
    edges: list[FiniteFloat]
    mass: list[FiniteFloat | None]

    @validator(mode="after")
    def one_bin_between_two_edges(self) -> Distance:
        if len(self.edges) - len(self.mass) not in (0, 1):
            raise problem(f"{len(self.edges)} edges do not fit {len(self.mass)} masses")
        return self


class Masses(Part):
    names: list[str]
    mass: list[FiniteFloat | None]

    @validator(mode="after")
    def one_mass_a_name(self) -> Masses:
        if len(self.names) != len(self.mass):
            raise problem(f"{len(self.names)} names do not fit {len(self.mass)} masses")
        return self


class Detail(Part):
    distance: Distance | None = None
    segments: Masses | None = None
    entropy: FiniteFloat | None = None


class Sample(Part):
    tokens: list[str]
    rows: dict[str, list[list[tuple[NonNegativeInt, FiniteFloat]]]] = {}

    @validator(mode="after")
    def rows_fit_the_tokens(self) -> Sample:
        for place, rows in self.rows.items():
            if len(rows) != len(self.tokens):
                raise problem(f"rows[{place!r}] has {len(rows)} rows for {len(self.tokens)} tokens")
            if any(key >= len(self.tokens) for row in rows for key, _ in row):
                raise problem(f"rows[{place!r}] points behind the last of {len(self.tokens)} tokens")
        return self


class Matrix(Part):
    """A small table drawn as a heat map."""

    title: Name
    what: str = ""
    rows: str = ""
    columns: str = ""
    row_names: list[str] = Field(min_length=1)
    column_names: list[str] = Field(min_length=1)
    values: Grid

    @validator(mode="after")
    def one_value_a_cell(self) -> Matrix:
        rows, columns = len(self.row_names), len(self.column_names)
        if len(self.values) != rows or any(len(row) != columns for row in self.values):
            raise problem(f"the values do not fit {rows} rows and {columns} columns")
        return self


class Payload(Part):
    version: Literal[1]
    model: Model
    created: str = ""
    tokens: NonNegativeInt | None = None
    command: str = ""
    streams: list[Stream] = Field(min_length=1)
    questions: list[Question] = Field(min_length=1)
    left_out: dict[str, str] = {}
    roles: dict[str, list[list[str | None]]] = {}
    role_rules: dict[str, str] = {}
    details: dict[str, Detail] = {}
    sample: Sample | None = None
    matrices: list[Matrix] = []

    @validator(mode="after")
    def everything_fits_the_streams(self) -> Payload:
        sizes = {stream.name: (len(stream.layers), stream.heads) for stream in self.streams}
        once("streams", [stream.name for stream in self.streams])
        once("questions", [question.name for question in self.questions])
        for question in self.questions:
            fits(f"questions[{question.name!r}].grid", question.grid, sizes)
            fits(f"questions[{question.name!r}].sem", question.sem or {}, sizes)
        fits("roles", self.roles, sizes)
        known("details", self.details, sizes)
        known("sample.rows", self.sample.rows if self.sample else {}, sizes)
        return self


def problem(words: str) -> PydanticCustomError:
    return PydanticCustomError("payload", "{words}", {"words": words})


def once(where: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise problem(f"{where}: the name {twice[0]!r} is there twice")


def fits(where: str, grids: dict[str, list[list[Any]]], sizes: dict[str, tuple[int, int]]) -> None:
    """Every grid belongs to a stream and has its layers; a row may be shorter, its last heads are missing then."""
    for stream, grid in grids.items():
        if stream not in sizes:
            raise problem(f"{where}[{stream!r}]: there is no such stream, there are {', '.join(sizes)}")
        layers, heads = sizes[stream]
        if len(grid) != layers:
            raise problem(f"{where}[{stream!r}] has {len(grid)} layers, the stream has {layers}")
        for layer, row in enumerate(grid):
            if len(row) > heads:
                raise problem(f"{where}[{stream!r}][{layer}] has {len(row)} heads, the stream has {heads}")


def known(where: str, places: Iterable[str], sizes: dict[str, tuple[int, int]]) -> None:
    """Every key is stream:layer:head, layer and head counted from 0 within the stream's grid."""
    for place in places:
        found = PLACE.fullmatch(place)
        layers, heads = sizes.get(found[1], (0, 0)) if found else (0, 0)
        if not found or int(found[2]) >= layers or int(found[3]) >= heads:
            raise problem(f"{where}[{place!r}] names no head: wanted stream:layer:head, as in {next(iter(sizes))}:0:0")


def check(payload: Any) -> Payload:
    """The payload as models, or a HeadwiseError that names the first field that is wrong."""
    try:
        return Payload.model_validate(payload)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"[{p!r}]" if isinstance(p, int) or not p.isidentifier() else f".{p}" for p in first["loc"])
        given = "" if first["type"] in ("payload", "missing") else f"; got {shortened(first['input'])}"
        raise HeadwiseError(f"payload{field}: {first['msg']}{given}.") from None


def shortened(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
