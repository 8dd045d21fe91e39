"""Freed memory: given back to the system, or kept for the next layer.

Small things that stay, allocated among a forward's large temporaries, pin the C heap: after a few scans of 4,096 tokens
it held 700 MB of holes. `malloc_trim` (glibc) gives them back, but every page given back is fetched again: after every
layer this cost a tenth of a scan. For the same reason a batch of long prompts costs more on a CPU than its rows one by
one: above some megabytes glibc gives an array back as soon as it is freed, and every layer fetches its pages again.
Elsewhere there is no need.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

WORTH = 2**26
"""Query-key pairs from which trimming is worth its time: four layers of 4,096 tokens."""


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


@dataclass
class Trimmer:
    """Counts query-key pairs of calls on a CPU, and trims when enough came together."""

    places: int = 0

    def __call__(self, places: int) -> None:
        self.places += places
        trim = _trim() if self.places >= WORTH else None
        if trim is not None:
            trim(0)
            self.places = 0


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's names for what stays at the end of the heap, and for what is fetched by itself (malloc.h)."""
OWN = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}
"""Where glibc's own adjustment of the two ends."""
CHOSEN = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_inside = 0


@contextmanager
def kept() -> Iterator[None]:
    """Memory that is freed inside stays in the process (glibc; a setting the user chose is left as it is)."""
    global _inside
    change = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if change is None or any(name in os.environ for name in CHOSEN):
        yield
        return
    _inside += 1
    for name, size in OWN.items():
        # Older versions of glibc take no more than their own ceiling for the second.
        change(name, 2**30) or change(name, size)
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            for name, size in OWN.items():
                change(name, size)
            trim = _trim()
            if trim is not None:
                trim(0)
