"""All mechanisms by name, and making one."""

from __future__ import annotations

from typing import Any

from headwise.errors import HeadwiseError
from headwise.swap.attention import Attention
from headwise.swap.mechanism import Mechanism

CLASSES: tuple[type[Mechanism], ...] = (Attention,)


MECHANISMS: dict[str, type[Mechanism]] = {mechanism.key(): mechanism for mechanism in CLASSES}


def make(name: str, dim: int, heads: int, **own: Any) -> Mechanism:
    """A mechanism by its name, as `headwise swap list` shows it."""
    if name not in MECHANISMS:
        raise HeadwiseError(f"mechanism: one of {', '.join(MECHANISMS)}; got {name!r}.")
    return MECHANISMS[name](dim, heads, **own)
