"""All mechanisms by name, and making one."""

from __future__ import annotations

import re
from typing import Any

from headwise.errors import HeadwiseError
from headwise.swap.attention import Attention
from headwise.swap.mechanism import Mechanism

CLASSES: tuple[type[Mechanism], ...] = (Attention,)


def name_of(mechanism: type[Mechanism]) -> str:
    """The name in lists and on the command line: the class's, in small letters with underscores."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", mechanism.__name__).lower()


MECHANISMS: dict[str, type[Mechanism]] = {name_of(mechanism): mechanism for mechanism in CLASSES}


def make(name: str, dim: int, heads: int, **own: Any) -> Mechanism:
    """A mechanism by its name, as `headwise swap list` shows it."""
    if name not in MECHANISMS:
        raise HeadwiseError(f"mechanism: one of {', '.join(MECHANISMS)}; got {name!r}.")
    return MECHANISMS[name](dim, heads, **own)
