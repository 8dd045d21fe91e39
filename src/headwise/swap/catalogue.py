"""All mechanisms by name, and making one."""

from __future__ import annotations

from typing import Any

from headwise.errors import HeadwiseError
from headwise.swap.attention import Attention
from headwise.swap.fixed_head import FixedHeadAttention
from headwise.swap.head_embedding import HeadEmbeddingAttention
from headwise.swap.mechanism import Mechanism
from headwise.swap.mixture_of_head import MixtureOfHeadAttention
from headwise.swap.multi_query import MultiQueryAttention
from headwise.swap.multi_token import MultiTokenAttention

CLASSES: tuple[type[Mechanism], ...] = (
    Attention,
    FixedHeadAttention,
    HeadEmbeddingAttention,
    MixtureOfHeadAttention,
    MultiQueryAttention,
    MultiTokenAttention,
)


MECHANISMS: dict[str, type[Mechanism]] = {mechanism.key(): mechanism for mechanism in CLASSES}


def make(name: str, dim: int, heads: int, **own: Any) -> Mechanism:
    """A mechanism by its name, as `headwise swap list` shows it."""
    if name not in MECHANISMS:
        raise HeadwiseError(f"mechanism: one of {', '.join(MECHANISMS)}; got {name!r}.")
    return MECHANISMS[name](dim, heads, **own)
