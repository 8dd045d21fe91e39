"""Efficient attention whose values are mixed over tokens first, by one learned matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.swap.attention import Heads
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Visible
from headwise.swap.parts.positions import Places
from headwise.swap.slim_projection import EfficientAttention

INITS: dict[str, Callable[[Tensor], Any]] = {
    "xavier": nn.init.xavier_uniform_,
    "kaiming": nn.init.kaiming_uniform_,
}


class SuperAttention(EfficientAttention):
    """`z_i = softmax(q x_i^T / sqrt(D)) W_A x_i`, W_A [max_len, max_len] learned: 2 dim^2 + max_len^2 parameters. It
    knows places, so that inputs of a fixed length need no positions. Shorter inputs take its upper left block, longer
    ones are refused; a causal one takes the lower triangle. Tokens that no query sees (padding) are left out of it;
    masks of single queries (packed documents) act after the mix. Places count from the start of a row, padding
    included.

    `share`: one matrix for all heads, or one a head. `init`: the identity with noise of 0.02 (it starts as nearly
    Efficient attention), "xavier" or "kaiming". The cache holds the mixed values beside the input. Scores and weights
    are ordinary; `effective` gives the map that acts on the input, whose rows need not sum to 1.
    """

    what: ClassVar[str] = "efficient attention with a learned mix of tokens in its values"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        max_len: int = 64,
        share: bool = True,
        init: Literal["identity", "xavier", "kaiming"] = "identity",
        **parts: Any,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, **parts)
        if max_len < 1 or init not in ("identity", *INITS):
            raise HeadwiseError(
                f"SuperAttention: max_len of at least 1, init one of identity, {', '.join(INITS)}; got {max_len}, "
                f"{init!r}."
            )
        self.max_len = max_len
        self.mixer = nn.Parameter(torch.eye(max_len) + 0.02 * torch.randn(1 if share else heads, max_len, max_len))
        for part in self.mixer.detach() if init in INITS else ():
            INITS[init](part)

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        entries = self.entries(cache, context)
        here, seen = self.places(x, positions, entries), self.visible(mask, len(x))
        q, k, v = self.project(x, x if context is None else context, here, context is not None)
        tokens = padding(seen)
        if tokens is not None:  # what a mask hides must not come in through the mix
            v = v * tokens[:, None, -v.shape[2] :, None].to(v)
        if entries is None:
            mixed = self.mix(v, 0)
        else:
            (v,) = entries.extend(v=v)
            (mixed,) = entries.extend(mixed=self.mix(v, entries.length))
            k = entries.extend(k=k)[0] if self.turns else v
            entries.length += x.shape[1]
        return self.combine(self.attend(q, k, mixed, seen, here), x)

    def matrix(self, length: int, first: int = 0) -> Float[Tensor, "#heads row token"]:
        """Rows `first` to `length` of W_A for `length` tokens."""
        if length > self.max_len:
            raise HeadwiseError(f"SuperAttention mixes up to max_len={self.max_len} tokens; got {length}.")
        W_A = self.mixer.tril() if self.causal else self.mixer
        return W_A[:, first:length, :length]

    def mix(self, x: Heads, first: int) -> Heads:
        return self.matrix(x.shape[2], first) @ x

    def effective(self, weights: Float[Tensor, "*batch heads query key"]) -> Float[Tensor, "*batch heads query key"]:
        """`A W_A`: what reaches a query from every token, for weights as `Map` reads them."""
        return weights @ self.matrix(weights.shape[-1]).to(weights)

    def flops(self, queries: int, keys: int | None = None) -> int:
        keys = queries if keys is None else keys
        return super().flops(queries, keys) + 2 * keys * keys * self.dim


def padding(mask: Mask) -> Bool[Tensor, "#batch key"] | None:
    """Which keys some query sees."""
    if any(part is not None for part in (mask.rule, mask.added, mask.indices)):
        raise HeadwiseError("SuperAttention mixes values before any mask: give a mask as bools.")
    return mask.key_valid if mask.allowed is None else mask.allowed.any((1, 2))
