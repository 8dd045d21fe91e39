"""`attend`: readings and edits on a model, for the forwards inside one `with` block."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from headwise.attention.call import AttentionCall, Labels
from headwise.attention.edits import Edit, Rebase
from headwise.attention.engine import Part, Result
from headwise.attention.incoming import Frame
from headwise.attention.label_table import LabelTable
from headwise.attention.memory import Trimmer
from headwise.attention.readings import Reading, sample_queries
from headwise.attention.rope import find_rotary
from headwise.attention.seam import Session, joined
from headwise.attention.tally import Tally
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.models.segments import Segments

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class SiteReport:
    """What became of one attention layer under `attend`."""

    site: str
    stream: str
    layer: int
    status: Literal["reached", "bypassed", "refused", "idle"]
    how: str
    path: str
    reason: str


@dataclass
class Asked:
    """What one run wants of one call."""

    site: Site
    number: int
    frame: Frame
    readings: list[Reading]
    parts: list[Part]
    edits: list[tuple[Edit, list[int]]]
    labels: Labels | None


@dataclass
class Run:
    """One open `attend`: what it wants, and what it has gathered."""

    readings: list[Reading]
    edits: list[Edit]
    segments: dict[str, Segments]
    seed: int
    inner: bool = False
    session: Session = field(init=False, repr=False)
    tally: Tally = field(init=False, repr=False)
    give_back: Trimmer = field(default_factory=Trimmer, repr=False)
    paths: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    forwards: int = 0
    _labels: dict[tuple, Labels] = field(default_factory=dict, repr=False)
    _rows: dict[tuple, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False)
    _prompts: dict[str, Tensor | None] = field(default_factory=dict, repr=False)
    """The token ids of the last forward that the segments of a stream were held against."""
    _tables: dict[tuple[str, torch.device], LabelTable] = field(default_factory=dict, repr=False)
    _rotary: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.tally = Tally()

    # -- what a user looks at ----------------------------------------------------------------------------------------

    @property
    def tree(self) -> xr.DataTree:
        """Everything read so far: a node per stream, dims sample, layer, head, query (+ segment, rank, ...)."""
        if not self.readings:
            raise HeadwiseError("This attend has no readings: give it readings=[...] to look at.")
        if self.tally.empty:
            raise HeadwiseError(
                "Nothing was read: no attention layer the readings name was called inside the `with` block."
            )
        return self.tally.tree({site.name: site for site in self.session.sites})

    @property
    def report(self) -> list[SiteReport]:
        """For every attention layer: reached, bypassed, refused or idle, and why."""
        session, rows = self.session, []
        for site in session.sites:
            how = session.how.get(site.name, "")
            path, reason = self.paths.get(site.name, ("", ""))
            status: Literal["reached", "bypassed", "refused", "idle"]
            if site.name in session.refused:
                status, reason = "refused", session.refused[site.name]
            elif site.name in session.reached:
                status, how = "reached", session.reached[site.name]
            elif how.startswith("none: "):
                status, how, reason = "refused", "none", how.removeprefix("none: ")
            elif site.name in session.ran:
                status, reason = "bypassed", "the layer ran, but its attention went past every way in that headwise has"
            else:
                status, reason = "idle", "the layer was not run"
            rows.append(SiteReport(site.name, site.stream, site.layer, status, how, path, reason))
        return rows

    def explain(self) -> str:
        """Per layer: how it was entered, which path computed it, and why that one."""
        lines = [f"{len(self.readings)} readings, {len(self.edits)} edits, {self.forwards} forwards"]
        for row in self.report:
            lines.append(
                f"{row.stream}:{row.layer} {row.site}: {row.status} ({row.how}), {row.path or '-'}: {row.reason or '-'}"
            )
        return "\n".join(lines)

    # -- what the session asks ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.forwards += 1
        self._labels.clear()
        self._rows.clear()

    def ask(self, call: AttentionCall, site: Site, number: int, frame: Frame) -> Asked:
        """The parts and edits this run has for one call of a site."""
        labels = self.labels(call, site, frame)
        readings, parts = [], []
        for reading in self.readings if self.inner or not call.inner else ():
            layers, heads = reading.chosen_layers, reading.chosen_heads
            if reading.stream not in (None, site.stream) or (layers is not None and site.layer not in layers):
                continue
            heads = None if heads is None else tuple(h for h in heads if h < call.heads)
            if heads == ():
                continue
            readings.append(reading)
            parts.append(Part(reading, self.rows(reading, call), heads))
        edits = []
        for edit in self.edits:
            if site.stream == (edit.stream or self.main):
                chosen = edit.heads_in(site.layer, call.heads)
                if chosen is not None:
                    edits.append((edit, chosen))
        if any(isinstance(edit, Rebase) for edit, _ in edits):
            kind = type(site.module).__module__
            if kind not in self._rotary:
                self._rotary[kind] = find_rotary(self.session.model, site.module)
            call.rotary = self._rotary[kind]
        return Asked(site, number, frame, readings, parts, edits, labels)

    @property
    def main(self) -> str:
        """The stream an edit means that names none: text where there is one, else the model's first."""
        streams = [site.stream for site in self.session.sites]
        return "text" if "text" in streams else streams[0]

    def rows(self, reading: Reading, call: AttentionCall) -> Tensor | None:
        """The queries a reading wants, as places in the call, on the CPU; None for all of them."""
        wanted = reading.queries
        if wanted == "all" or (isinstance(wanted, int) and wanted >= call.queries):
            return None
        # All layers of a forward get the same rows, in one tensor: what is made from it is made once.
        key = (wanted, call.queries, call.first, id(call.query_valid))
        if key not in self._rows:
            if isinstance(wanted, int):
                valid = torch.ones(1, call.queries) if call.query_valid is None else call.query_valid.cpu()
                rows = sample_queries(wanted, valid.bool(), self.seed + self.forwards)
            else:
                last = call.last + 1
                places = torch.tensor([p if p >= 0 else last + p for p in wanted])
                rows = torch.isin(call.places, places).nonzero().flatten()
            self._rows[key] = rows, call.query_valid
        return self._rows[key][0]

    def labels(self, call: AttentionCall, site: Site, frame: Frame) -> Labels | None:
        """Segment numbers of this call's keys and queries, from the run's segments or from positions alone."""
        given = self.segments.get(site.stream)
        first, last = call.first, call.last
        key = (site.stream, site.kind, call.batch, call.keys, call.queries, call.j0, first, last)
        if key in self._labels:
            return self._labels[key]
        if (
            given is not None
            and frame.past == 0
            and site.kind == "self"
            and not self.grown(site.stream, frame, last + 1)
        ):
            given.validate(last + 1)
            self._prompts[site.stream] = frame.ids
        length = max(call.j0 + call.keys, last + 1)
        known = self.known(site.stream, call.q.device)
        table = known.table(length, call.batch)
        keys = table[:, call.j0 : call.j0 + call.keys].contiguous()
        if site.kind != "self":
            queries = torch.zeros_like(call.i)[None]
        elif last - first + 1 == call.queries:
            queries = table[:, first : last + 1].contiguous()
        else:
            queries = table[:, call.i]
        labels = self._labels[key] = Labels(known.names(length), keys, queries)
        return labels

    def grown(self, stream: str, frame: Frame, length: int) -> bool:
        """Whether this is the labelled text again with more behind it: `generate()` without a cache passes it anew for
        every token. What is new is called "generated"."""
        prompt, ids = self._prompts.get(stream), frame.ids
        if prompt is None or ids is None or len(ids) != len(prompt) or not prompt.shape[1] < ids.shape[1] == length:
            return False
        return torch.equal(ids[:, : prompt.shape[1]], prompt)

    def known(self, stream: str, device: torch.device) -> LabelTable:
        """The stream's labels on this device."""
        if (stream, device) not in self._tables:
            self._tables[stream, device] = LabelTable(self.segments.get(stream), device)
        return self._tables[stream, device]

    def take(self, asked: Asked, call: AttentionCall, result: Result, values: Sequence[dict[str, Tensor]]) -> None:
        """Folds one call's values into the run."""
        site = asked.site
        self.paths[site.name] = (result.path, result.reason)
        if call.inner and not self.inner:
            return
        start = self.tally.start(site.name, asked.number, call.batch, continued=asked.frame.past > 0)
        for part, read in zip(asked.parts, values, strict=True):
            self.tally.add(part, site, asked.number, start, call, read)
        if asked.parts and call.q.device.type == "cpu":
            self.give_back(call.queries * call.keys)

    def check(self) -> None:
        """On leaving: an edit took effect or raises, a reading that missed layers says so."""
        if self.session.planner.scratch.flagged():
            raise HeadwiseError("Reweight(rule=...) returned weights that are negative or not finite.")
        missed = [r for r in self.report if r.status in ("bypassed", "refused")]
        for edit in self.edits:
            for row in missed:
                if row.stream == (edit.stream or self.main) and edit.heads_in(row.layer, self._heads(row.site)):
                    raise HeadwiseError(f"{type(edit).__name__} had no effect on {row.site}: {row.reason}.")
        if missed and self.forwards and self.readings:
            names = ", ".join(r.site for r in missed[:3]) + (" ..." if len(missed) > 3 else "")
            if self.tally.empty:
                raise HeadwiseError(f"No attention layer could be read: {names}: {missed[0].reason}.")
            warnings.warn(f"{len(missed)} attention layers were not read ({names}): {missed[0].reason}.", stacklevel=4)

    def _heads(self, name: str) -> int:
        return next(s.heads for s in self.session.sites if s.name == name)


@contextmanager
def attend(
    model: nn.Module | Any,
    readings: Sequence[Reading] = (),
    edits: Sequence[Edit] = (),
    segments: Segments | Mapping[str, Segments] | None = None,
    seed: int = 0,
    inner: bool = False,
) -> Iterator[Run]:
    """Reads and edits every attention call of `model` inside the block, and leaves the model as it was.

    `segments` name the tokens of the main stream (or a mapping from stream to segments); without them a token is
    "first" or "rest". `seed` decides which queries a reading with `queries=256` samples. Blocks on one model nest:
    edits of the outer come first. `inner`: some layers attend to make the queries, keys or values of their last call
    (`swap.NexusAttention`); these calls are read too, along a dimension "call".

    Raises HeadwiseError where an edit can't take effect, where nothing can be read, and where segments don't fit.
    """
    sites = getattr(model, "sites", None) if not isinstance(model, nn.Module) else None
    whole = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(whole, nn.Module):
        raise HeadwiseError(f"attend wants a torch.nn.Module or an opened model; got a {type(model).__name__}.")
    model = whole
    for kind, items, base in (("readings", readings, Reading), ("edits", edits, Edit)):
        for item in items:
            if not isinstance(item, base):
                raise HeadwiseError(f"attend({kind}=...) takes {kind} such as headwise.{_EXAMPLE[kind]}; got {item!r}.")
    names = Counter(name for reading in readings for name in reading.names().values())
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise HeadwiseError(f"Two readings are called {twice[0]!r}: give one of them name=... .")
    run = Run(list(readings), list(edits), {}, seed, inner)
    with joined(model, run, sites) as session:
        run.session = session
        run.tally.layers = Counter(site.stream for site in session.sites)
        _validate(run, session)
        run.segments = _segments(run, session, segments)
        yield run
        run.check()


_EXAMPLE = {"readings": "Entropy()", "edits": "HeadGain(layer=0, heads=[1], gain=0.0)"}


def _validate(run: Run, session: Session) -> None:
    if not session.sites:
        raise HeadwiseError(f"{type(session.model).__name__} has no attention layers headwise can find.")
    ways = [session.how[site.name] for site in session.sites]
    if all(way.startswith("none: ") for way in ways):
        raise HeadwiseError(
            f"{type(session.model).__name__} can't be entered: {ways[0].removeprefix('none: ')}, so there is no call "
            "to look at (`headwise doctor` lists every layer)."
        )
    streams = {site.stream for site in session.sites}
    items: list[Reading | Edit] = [*run.readings, *run.edits]
    for item in items:
        label = type(item).__name__
        if item.stream is not None and item.stream not in streams:
            raise HeadwiseError(
                f"{label}(stream={item.stream!r}): this model's streams are {', '.join(sorted(streams))}."
            )
        stream = item.stream or (run.main if isinstance(item, Edit) else None)
        mine = [site for site in session.sites if stream in (None, site.stream)]
        layers = {site.layer for site in mine}
        if isinstance(item, Reading):
            heads = range(max(site.heads for site in mine))
            for head in item.chosen_heads or ():
                if head not in heads:
                    raise HeadwiseError(
                        f"{label}(heads=...) names head {head}; this model's layers have {len(heads)} heads."
                    )
        else:
            for site in mine:
                item.heads_in(site.layer, site.heads)
        for layer in item.chosen_layers or ():
            if layer not in layers:
                raise HeadwiseError(
                    f"{label} names layer {layer}, but the {stream or 'model'} layers are {min(layers)} "
                    f"to {max(layers)}."
                )


def _segments(run: Run, session: Session, given: Segments | Mapping[str, Segments] | None) -> dict[str, Segments]:
    outer = next((r.segments for r in session.runs if r is not run and r.segments), {})
    if given is None:
        return outer
    found = {run.main: given} if isinstance(given, Segments) else dict(given)
    for name, value in found.items():
        if not isinstance(value, Segments):
            raise HeadwiseError(f"attend(segments=...) wants Segments; got a {type(value).__name__} for {name!r}.")
    if any(outer.get(name, value) is not value for name, value in found.items()):
        raise HeadwiseError("Nested attends on one model must share their segments: give them to the outer one only.")
    return {**outer, **found}


def probe(model: nn.Module | Any, batch: Mapping[str, Any]) -> list[SiteReport]:
    """One plain forward, looked at: how every attention layer of the model can be entered, or why not."""
    from headwise.attention.readings import LogSumExp

    opened, model = model, getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    run = Run([LogSumExp(per="head")], [], {}, 0)
    with joined(model, run, getattr(opened, "sites", None)) as session, torch.no_grad():
        run.session = session
        run.tally.layers = Counter(site.stream for site in session.sites)
        if not session.sites:
            raise HeadwiseError(f"{type(model).__name__} has no attention layers headwise can find.")
        model(**batch)
        return run.report
