"""Attention with a slot of its own for what no token should get: a learned key (and value) that every query sees."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads
from headwise.swap.parts.positions import Places


class BiasedAttention(Attention):
    """`z_i = sum_j a_ij v_j + a_i* v*`, the weights a softmax over all keys and a slot with the key k* (which is not
    turned and has no position). Without `v_bias` the slot's value is 0; without `k_bias` there is no slot, and v* is
    added to every output. `per_head`: a slot for every key-value head, or one for all. k* and v* start from N(0, 0.02).

    In a trained model a slot takes its share from the start, so that the output at step 0 is not equal.

    How it runs: `q . (k_j - k*)` against a slot whose score is 0, and `v_j - v*` with v* added afterwards, are the
    same weights and outputs. So the slot is the core's sink column, and no key is put in; raw scores and head outputs
    that are read are those of the differences.
    """

    paper: ClassVar[Paper] = Paper("When Attention Sink Emerges in Language Models: An Empirical View", "2410.10781")
    what: ClassVar[str] = "a learned key and value beside the tokens', seen by every query"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        k_bias: bool = True,
        v_bias: bool = False,
        per_head: bool = True,
        **parts: Any,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, **parts)
        if not (self.score.plain and self.normaliser.softmax):
            raise HeadwiseError(
                "BiasedAttention: the slot is for softmax of scaled dot products: leave out score and normaliser."
            )
        slots = self.kv_heads if per_head else 1
        self.k_slot = nn.Parameter(0.02 * torch.randn(slots, 1, self.head_dim)) if k_bias else None
        self.v_slot = nn.Parameter(0.02 * torch.randn(slots, 1, self.value_dim)) if v_bias else None

    def attend(self, q: Heads, k: Heads, v: Heads, mask: Mask, here: Places, j0: int = 0, **how: Any) -> Heads:
        if self.k_slot is None:
            z = super().attend(q, k, v, mask, here, j0, **how)
            return z if self.v_slot is None else z + self.spread(self.v_slot)
        how["sinks"] = q.new_zeros(self.heads)
        if self.v_slot is None:
            return super().attend(q, k - self.k_slot, v, mask, here, j0, **how)
        z = super().attend(q, k - self.k_slot, v - self.v_slot, mask, here, j0, **how)
        return z + self.spread(self.v_slot)

    def spread(self, slot: Float[Tensor, "slots one width"]) -> Float[Tensor, "#heads one width"]:
        """One for every query head, where there are several."""
        return slot if len(slot) == 1 else slot.repeat_interleave(self.heads // self.kv_heads, 0)
