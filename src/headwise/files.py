"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.errors import HeadwiseError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to (a file or a folder), moved into place when the block ends well, else removed.

    >>> with replacing("scan.json") as unfinished:  # doctest: +SKIP
    ...     unfinished.write_text("{}")
    """
    path = check_writable(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        unfinished = folder / path.name  # keeps the suffix, which says the format
        yield unfinished
        if path.is_dir():
            path.rename(folder / "replaced")
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: str | Path) -> Path:
    """The path, when its folder is there and can be written: to be asked before the work, not after it."""
    path = Path(path)
    if not path.parent.is_dir():
        raise HeadwiseError(
            f"The folder {path.parent} for {path.name} does not exist: make it first, or choose another."
        )
    if not os.access(path.parent, os.W_OK):
        raise HeadwiseError(f"The folder {path.parent} for {path.name} cannot be written to: choose another.")
    return path
