"""Attention by a function of each score, with or without a normaliser."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.swap.attention import Attention
from headwise.swap.parts.normalisers import Activation, Softmax


class ScoreActivation(Attention):
    """`a_ij = f(s_ij)`, f = softmax, sigmoid, elu1 (elu + 1) or relu; `normalise` divides a row by its sum (softmax
    always is). Without it a row need not spend anything, and the paper finds no sink."""

    paper: ClassVar[Paper] = Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781")
    what: ClassVar[str] = "a function of every score as its weight, normalised or not"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        function: Literal["softmax", "sigmoid", "elu1", "relu"] = "sigmoid",
        normalise: bool = False,
        **parts: Any,
    ):
        if function == "softmax" and not normalise:
            raise HeadwiseError("ScoreActivation: softmax is normalised by what it is: give normalise=True.")
        normaliser = Softmax() if function == "softmax" else Activation(function, normalise)
        super().__init__(dim, heads, kv_heads, head_dim, normaliser=normaliser, **parts)
