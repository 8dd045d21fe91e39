"""How many dimensions of its queries and keys does a head use to choose?

The scores of a head are `S = Q K^T / sqrt(D)`, of rank at most the head dim D, however many tokens there are; a head
with fewer dimensions than tokens cannot make every pattern of attention. Softmax ignores what is added to a whole row,
so the rank that matters is that of the row-centred scores, `S (I - 11^T/n) = Q (K - mean K)^T / sqrt(D)`. Its singular
values are those of `(Q^T Q)^(1/2) (K_c^T K_c)^(1/2)`, two D x D matrices: no tokens x tokens matrix is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention.readings import Inputs, Reading
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.question import Column, Prompt, Question


@dataclass(frozen=True)
class ScoreRank(Question):
    """`score_rank`: how many singular values of the centred scores hold the share `tol` of their squared sum.
    `score_rank_entropy`: the effective rank `exp(-sum p log p)`, p the singular values divided by their sum.
    `query_rank` and `key_rank`: the first measure, for the queries and for the centred keys themselves.

    Queries and keys as the attention call gets them (rotated, where the model rotates); position biases, soft caps and
    masks don't count. An input of n tokens shows at most n - 1 dimensions, so give inputs much longer than the head
    dim. Under a causal mask half of the scores is free, so that a low rank can reach more patterns than without."""

    tol: float = 0.99
    paper: ClassVar[Paper] = Paper("Low-Rank Bottleneck in Multi-head Attention Models", "2002.07028")

    def __post_init__(self) -> None:
        if not 0 < self.tol < 1:
            raise HeadwiseError(f"ScoreRank(tol=...) must lie between 0 and 1; got {self.tol!r}.")

    def columns(self) -> tuple[Column, ...]:
        share = f"{self.tol:.0%}"
        return (
            Column(
                "score_rank",
                "Rank of the scores",
                f"Dimensions that hold {share} of the head's scores (squared, each row's mean taken off).",
                "dimensions",
                "chooses by many features at once",
            ),
            Column(
                "score_rank_entropy",
                "Effective rank of the scores",
                "Exponential of the entropy of the scores' singular values.",
                "dimensions",
                "chooses by many features at once",
            ),
            Column("query_rank", "Rank of the queries", f"Dimensions that hold {share} of the queries.", "dimensions",
                   "asks in many directions"),
            Column("key_rank", "Rank of the keys", f"Dimensions that hold {share} of the keys about their mean.",
                   "dimensions", "can be asked for in many directions"),
        )  # fmt: skip

    def readings(self, opened: Opened) -> list[Reading]:
        return [Inputs(("q", "k"), moments=True)]

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        order = ("layer", "head", "channel", "channel2")
        q, k = (values[f"input_{w}_cov"].transpose(..., *order) for w in "qk")
        mean = values["input_q_mean"].transpose(..., *order[:3])
        center, query, key = (torch.as_tensor(x.values).double().nan_to_num() for x in (mean, q, k))
        second = query + center[..., :, None] * center[..., None, :]
        scores = singular_values(second, key)
        found = {
            "rank": rank_of(scores, self.tol),
            "entropy": effective_rank(scores),
            "query": rank_of(torch.linalg.eigvalsh(second).clamp(min=0).sqrt(), self.tol),
            "key": rank_of(torch.linalg.eigvalsh(key).clamp(min=0).sqrt(), self.tol),
        }
        there = mean.notnull().any("channel")
        ranks = {name: xr.DataArray(x.numpy(), there.coords, there.dims).where(there) for name, x in found.items()}
        return xr.Dataset(ranks).mean([d for d in there.dims if d not in ("layer", "head")])

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        names = {"score_rank": "rank", "score_rank_entropy": "entropy", "query_rank": "query", "key_rank": "key"}
        return {column: values[name] for column, name in names.items()} | {
            f"{column}_sem": values[f"{name}_sem"] for column, name in names.items()
        }


def singular_values(
    query: Float[Tensor, "*head dim dim"], key: Float[Tensor, "*head dim dim"]
) -> Float[Tensor, "*head dim"]:
    """Those of `Q K^T` from `Q^T Q` and `K^T K`, up to the common factor of the two, the largest first."""
    return torch.linalg.svdvals(_root(query) @ _root(key))


def _root(gram: Float[Tensor, "*head dim dim"]) -> Float[Tensor, "*head dim dim"]:
    roots, vectors = torch.linalg.eigh(gram)
    return (vectors * roots.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


def rank_of(singular: Float[Tensor, "*head dim"], tol: float) -> Int[Tensor, "*head"]:
    """How many of the largest hold the share `tol` of the squared sum; 0 where all are 0."""
    energy = singular.square().sort(-1, descending=True).values
    total = energy.sum(-1, keepdim=True)
    short = energy.cumsum(-1) < tol * total * (1 - 1e-12)
    return (short.sum(-1) + 1) * (total[..., 0] > 0)


def effective_rank(singular: Float[Tensor, "*head dim"]) -> Float[Tensor, "*head"]:
    """`exp(-sum p log p)` of the singular values divided by their sum; 0 where all are 0."""
    total = singular.sum(-1, keepdim=True)
    p = singular / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.special.entr(p).sum(-1).exp() * (total[..., 0] > 0)


def log_rank(weights: Float[Tensor, "query key"], tol: float = 1e-9) -> int:
    """The exact criterion for a pattern of attention: a head of head dim p can make it if and only if
    `rank((log P)(I - 11^T/n)) <= p` (given tokens that are linearly independent, and no mask)."""
    logs = weights.double().log()
    return int(torch.linalg.matrix_rank(logs - logs.mean(-1, keepdim=True), rtol=tol))


def construct(
    weights: Float[Tensor, "token token"], tokens: Float[Tensor, "token model"]
) -> tuple[Float[Tensor, "model dim"], Float[Tensor, "model dim"]]:
    """`W_Q`, `W_K` of a head whose dim is the number of tokens n and which attends exactly by `weights` (scale
    `1/sqrt(n)`): `W_Q = X^+`, `W_K = sqrt(n) X^+ (log P)^T`. `tokens` must be linearly independent, `weights` positive.
    """
    n = len(tokens)
    if tokens.shape[1] < n or int(torch.linalg.matrix_rank(tokens)) < n:
        raise HeadwiseError(f"tokens: wanted {n} linearly independent rows; got shape {tuple(tokens.shape)}.")
    if not bool((weights > 0).all()):
        raise HeadwiseError("weights: wanted positive weights only, as softmax never gives 0.")
    inverse = torch.linalg.pinv(tokens)
    return inverse, n**0.5 * inverse @ weights.log().T
