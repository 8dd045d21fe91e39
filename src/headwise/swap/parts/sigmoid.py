"""Attention without competition: every key is weighted by itself."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from headwise.attention.call import AttentionCall
from headwise.errors import HeadwiseError
from headwise.swap.kernels import fits
from headwise.swap.parts.normalisers import Normaliser, Scored, Seen


class Sigmoid(Normaliser):
    """`a_ij = sigmoid(e^temperature s_ij + b)`; rows need not sum to 1, and nothing makes them ("Theory, Analysis, and
    Best Practices for Sigmoid Self-Attention", arXiv 2409.04431).

    `b`: a number, or
    - "auto": -ln of the most keys it has been trained on, so that weights begin near 1/n. The length is kept in the
      state dict; asked before any training, it raises. Longer sequences afterwards have larger row sums.
    - "match": minus the log-sum-exp of the row, without a gradient. With softmax weights p these are p / (1 + p): near
      them where they are small, for models that were trained with softmax.

    `divide`: the row by "count", how many keys it sees, or "sqrt", the root of that (the paper's code has both).
    """

    def __init__(
        self,
        b: float | Literal["auto", "match"] = "auto",
        temperature: float = 0.0,
        divide: Literal["count", "sqrt"] | None = None,
    ):
        super().__init__()
        if b not in ("auto", "match") and not (isinstance(b, int | float) and not math.isnan(b)):
            raise HeadwiseError(f"Sigmoid: b is a number, 'auto' or 'match'; got {b!r}.")
        if divide not in (None, "count", "sqrt"):
            raise HeadwiseError(f"Sigmoid: divide is None, 'count' or 'sqrt'; got {divide!r}.")
        self.b, self.temperature, self.divide = b, temperature, divide
        self.length = 0
        """The most keys seen in training."""

    def offset(self, keys: int) -> float:
        """b for a call of so many keys, where it is the same for all rows."""
        if not isinstance(self.b, str):
            return self.b
        if self.training:
            self.length = max(self.length, keys)
        if not self.length:
            raise HeadwiseError("Sigmoid(b='auto') is -ln of the length it was trained on, which it was not: give b.")
        return -math.log(self.length)

    def forward(self, s: Scored, seen: Seen) -> Scored:
        s = s * math.exp(self.temperature)
        if self.b == "match":
            offset: Tensor | float = -torch.logsumexp(s.detach(), -1, keepdim=True).nan_to_num(neginf=0.0)
        else:
            offset = self.offset(s.shape[-1])
        a = torch.sigmoid(s + offset).masked_fill(~seen, 0.0)
        if self.divide is None:
            return a
        count = seen.sum(-1, keepdim=True).clamp(min=1).to(a)
        return a / (count if self.divide == "count" else count.sqrt())

    def has_kernel(self, call: AttentionCall) -> bool:
        return self.b != "match" and self.divide is None and fits(call)

    def kernel(self, call: AttentionCall) -> Tensor:
        from headwise.swap.kernels.sigmoid import sigmoid_attention  # triton is not installed everywhere

        scale, b = call.scale * math.exp(self.temperature), self.offset(call.keys)
        causal, valid = call.mask.right == 0, call.mask.key_valid
        with torch.cuda.device(call.q.device):
            return sigmoid_attention(call.q, call.k, call.v, scale, b, causal, call.first - call.j0, valid)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.length)

    def set_extra_state(self, state: Tensor) -> None:
        self.length = int(state) or self.length  # weights kept from before any training don't say
