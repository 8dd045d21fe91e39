"""A half-finished scan on disk: what every finished pass showed, in one netCDF file that is replaced whole or not at
all."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import xarray as xr

from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.scan.passes import Plan, likeness

Found = list[dict[str, xr.Dataset]]
EVERY = 20.0
"""Seconds between two writes."""


class Checkpoint:
    """Keeps the passes that are done; with a path, on disk as well."""

    def __init__(self, path: str | os.PathLike[str] | None, plan: Plan, seed: int):
        self.path = None if path is None else Path(path)
        self.done: dict[int, Found] = {}
        self.failed: dict[str, str] = {}
        """Questions that could not use what they saw, and why."""
        self.written = time.monotonic()
        if self.path is None:
            return
        self.identity = identify(plan, seed)
        if self.path.exists():
            self.done = self._read()

    def _read(self) -> dict[int, Found]:
        try:
            tree = xr.load_datatree(self.path, engine="h5netcdf")
        except Exception as error:
            raise HeadwiseError(
                f"checkpoint: {self.path} cannot be read ({error}); delete it to start again."
            ) from error
        if tree.attrs.get("identity") != self.identity:
            raise HeadwiseError(
                f"checkpoint: {self.path} belongs to another scan (model, inputs or questions differ): use another one."
            )
        self.failed = json.loads(tree.attrs["failed"])
        return {
            int(number): [
                {stream: node.to_dataset() for stream, node in question.children.items()}
                for _, question in sorted(found.children.items(), key=lambda item: int(item[0]))
            ]
            for number, found in tree.children.items()
        }

    def add(self, number: int, found: Found) -> None:
        self.done[number] = found
        if self.path is not None and time.monotonic() - self.written > EVERY:
            self.write()

    def write(self) -> None:
        if self.path is None or not self.done:
            return
        nodes = {"/": xr.Dataset(attrs={"identity": self.identity, "failed": json.dumps(self.failed)})}
        for number, found in self.done.items():
            for place, streams in enumerate(found):
                nodes[f"/{number}/{place}"] = xr.Dataset()
                nodes |= {f"/{number}/{place}/{stream}": values for stream, values in streams.items()}
        with replacing(self.path) as unfinished:
            xr.DataTree.from_dict(nodes).to_netcdf(unfinished, engine="h5netcdf")
        self.written = time.monotonic()

    def finish(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def identify(plan: Plan, seed: int) -> str:
    """Two scans with the same identity have the same model, inputs, readings and questions."""
    digest = hashlib.sha256(f"{plan.opened.fingerprint} {seed}".encode())
    for one in plan.passes:
        digest.update(repr([(q.name, q) for q in one.questions]).encode())
        digest.update(repr([type(r).__name__ + str(r.queries) for r in one.readings]).encode())
        digest.update(likeness(one.prompt).encode())
    return digest.hexdigest()[:16]
