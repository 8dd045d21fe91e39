"""Giving freed memory back to the system.

Small things that stay, allocated among a forward's large temporaries, pin the C heap: after a few scans of 4,096 tokens
it held 700 MB of holes. `malloc_trim` (glibc) gives them back, but every page given back is fetched again: after every
layer this cost a tenth of a scan. Elsewhere there is nothing to do.
"""

import ctypes
from collections.abc import Callable
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
