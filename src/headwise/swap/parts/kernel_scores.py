"""Scores that are products of features, used as weights as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention.call import AttentionCall
from headwise.errors import HeadwiseError
from headwise.swap.parts.normalisers import Normaliser, Scored, Seen
from headwise.swap.parts.scores import Score


class KernelScore(Score):
    """`s_ij = scale phi(q_i) . phi(k_j)`, phi the same for queries and keys and for all heads: identity, elu1
    (elu + 1), relu, or mlp (linear, relu, linear, all `dim` wide)."""

    def __init__(self, kernel: Literal["identity", "elu1", "relu", "mlp"], dim: int):
        super().__init__()
        made: dict[str, Callable[[], nn.Module]] = {
            "identity": nn.Identity,
            "elu1": Elu1,
            "relu": nn.ReLU,
            "mlp": lambda: nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)),
        }
        if kernel not in made:
            raise HeadwiseError(f"kernel: one of {', '.join(made)}; got {kernel!r}.")
        self.phi: nn.Module = made[kernel]()

    def forward(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch heads key dim"],
        call: AttentionCall,
    ) -> Float[Tensor, "batch heads query key"]:
        # the core computes more exactly than the weights of phi may be kept
        features = (self.phi(x.to(call.q.dtype)).to(x.dtype) for x in (q, k))
        return torch.einsum("bhid,bhjd->bhij", *features) * call.scale

    def flops(self, queries: int, keys: int, heads: int, dim: int) -> int:
        wide = sum(p.numel() for p in self.phi.parameters() if p.ndim == 2)
        return super().flops(queries, keys, heads, dim) + 2 * (queries + keys) * heads * wide


class Elu1(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.elu(x) + 1


class Direct(Normaliser):
    """`a_ij = s_ij`, divided by the row's sum plus 1e-8 ("sum", for scores that are never negative), by the size of the
    sum or 1, whichever is larger ("bounded", for those of either sign), or by nothing."""

    def __init__(self, divide: Literal["sum", "bounded"] | None = None):
        super().__init__()
        self.divide = divide

    def forward(self, s: Scored, seen: Seen) -> Scored:
        a = s.masked_fill(~seen, 0.0)
        if self.divide is None:
            return a
        total = a.sum(-1, keepdim=True)
        return a / (total + 1e-8 if self.divide == "sum" else total.abs().clamp(min=1))
