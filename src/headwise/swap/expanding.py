"""Attention whose reach every query infers for itself, and whose window grows until it suffices."""

from __future__ import annotations

from typing import Any, ClassVar

from headwise.swap.parts.priors import GeometricBeta
from headwise.swap.structural import StructuralAttention


class ExpandingAttention(StructuralAttention):
    """`StructuralAttention` with a geometric prior on distance and a Beta prior on its rate (formula, and what `a0`,
    `b0`, `iterations`, `tol` and `start` are: `GeometricBeta`). Not equal to softmax at step 0: the prior is not
    flat."""

    what: ClassVar[str] = "a geometric prior on distance, its rate inferred by every query"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        a0: float = 1.0,
        b0: float = 1.0,
        iterations: int = 4,
        tol: float = 0.0,
        start: int = 4,
        **parts: Any,
    ):
        score = GeometricBeta(a0, b0, iterations, tol, start)
        super().__init__(dim, heads, kv_heads, head_dim, prior="geometric_beta", score=score, **parts)
