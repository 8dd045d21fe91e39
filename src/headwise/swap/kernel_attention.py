"""Attention by a kernel of features, with or without a normaliser."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from headwise.paper import Paper
from headwise.swap.attention import Attention
from headwise.swap.parts.kernel_scores import Direct, KernelScore


class KernelAttention(Attention):
    """`a_ij = phi(q_i) . phi(k_j) / sqrt(d)` with phi = identity, elu1, relu or mlp (see `KernelScore`), after the
    rotation. `normalise` divides a row by its sum (elu1, relu) or by the larger of the sum's size and 1 (identity, mlp,
    whose weights have either sign). Weights that are not normalised, or may be negative, need no place to put a
    surplus, and the paper finds no sink in them. The scale 1/sqrt(d) is kept without a normaliser too.
    """

    paper: ClassVar[Paper] = Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781")
    what: ClassVar[str] = "products of features as weights, normalised or not"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        kernel: Literal["identity", "elu1", "relu", "mlp"] = "elu1",
        normalise: bool = False,
        **parts: Any,
    ):
        width = head_dim or dim // max(heads, 1)
        divide: Literal["sum", "bounded"] = "sum" if kernel in ("elu1", "relu") else "bounded"
        super().__init__(
            dim, heads, kv_heads, head_dim, score=KernelScore(kernel, width),
            normaliser=Direct(divide if normalise else None), **parts,
        )  # fmt: skip
