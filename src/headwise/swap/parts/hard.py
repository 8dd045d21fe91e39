"""Links that are there or not."""

from __future__ import annotations

from typing import Literal

import torch

from headwise.errors import HeadwiseError
from headwise.swap.parts.normalisers import Normaliser, Scored, Seen


class Hard(Normaliser):
    """One link of every query ("categorical": the posterior is the softmax of the scores), or each there or not by
    itself ("bernoulli": their sigmoid). In training they are drawn from the posterior, otherwise the most probable is
    taken. The gradient is that of the soft weights (straight through)."""

    def __init__(self, edge: Literal["categorical", "bernoulli"] = "categorical"):
        super().__init__()
        if edge not in ("categorical", "bernoulli"):
            raise HeadwiseError(f"Hard: edge is 'categorical' or 'bernoulli'; got {edge!r}.")
        self.edge = edge

    def forward(self, s: Scored, seen: Seen) -> Scored:
        if self.edge == "bernoulli":
            soft = torch.sigmoid(s)
            drawn = soft > (torch.rand_like(soft) if self.training else 0.5)
        else:
            soft = super().forward(s, seen)
            drawn = torch.zeros_like(s, dtype=torch.bool).scatter(-1, self.chosen(s), True)
        soft = soft.masked_fill(~seen, 0.0)
        return (drawn & seen).to(s) + (soft - soft.detach())

    def chosen(self, s: Scored) -> torch.Tensor:
        """The place of the one link; the largest score with Gumbel noise is a draw from the softmax."""
        noisy = s - torch.empty_like(s).exponential_().log() if self.training else s
        return noisy.argmax(-1, keepdim=True)
