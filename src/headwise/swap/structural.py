"""Attention as what is expected of unknown links: any prior over them, one link a token or each by itself."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.swap.attention import Attention
from headwise.swap.parts.hard import Hard
from headwise.swap.parts.normalisers import Normaliser, Softmax
from headwise.swap.parts.positions import Alibi, Position
from headwise.swap.parts.priors import GeometricBeta, LogPrior, Prior
from headwise.swap.parts.scores import Score
from headwise.swap.parts.sigmoid import Sigmoid


class StructuralAttention(Attention):
    """`z_i = E[v(phi_i) | x]`: `p(phi_i = j | x)` is the prior of the link times `exp(q_i . k_j / sqrt(d))`,
    normalised.

    `prior`: "uniform" (softmax attention), "alibi", "geometric_beta" (see `GeometricBeta`, which `ExpandingAttention`
    offers with its settings), or a function `(i, j) -> ln p` of positions (see `Prior`). What a token can't link to is
    the mask's business, as is the causal order.
    `edge`: "categorical", one link from every token; "bernoulli", every link by itself: `sigmoid(score + log odds)`,
    the prior then being log odds, and uniform even odds.
    `hard`: links drawn from the posterior in training and the most probable otherwise (see `Hard`).

    In a trained model equal at step 0 with a categorical edge, a uniform prior and hard=False.
    """

    paper: ClassVar[Paper] = Paper("Attention: Marginal Probability is All You Need?", "2304.04556")
    what: ClassVar[str] = "the expected value of an unknown link, under any prior"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        prior: Literal["uniform", "alibi", "geometric_beta"] | LogPrior = "uniform",
        edge: Literal["categorical", "bernoulli"] = "categorical",
        hard: bool = False,
        position: Position | None = None,
        score: Score | None = None,
        **parts: Any,
    ):
        name = type(self).__name__
        if isinstance(prior, str) and prior not in ("uniform", "alibi", "geometric_beta"):
            raise HeadwiseError(f"{name}: prior is uniform, alibi, geometric_beta or a function; got {prior!r}.")
        if edge not in ("categorical", "bernoulli"):
            raise HeadwiseError(f"{name}: edge is categorical or bernoulli; got {edge!r}.")
        if prior == "geometric_beta":
            score = score or GeometricBeta()
        if edge == "bernoulli" and isinstance(score, GeometricBeta):
            raise HeadwiseError(f"{name}: geometric_beta is a prior of one link a token: edge must be categorical.")
        if prior == "alibi":
            position = Prior(Alibi(), position)
        elif callable(prior):
            position = Prior(prior, position)
        normaliser: Normaliser = Hard(edge) if hard else Softmax() if edge == "categorical" else Sigmoid(b=0.0)
        super().__init__(
            dim, heads, kv_heads, head_dim, position=position, score=score, normaliser=normaliser, **parts
        )  # fmt: skip
