"""One sparse key-value memory for each head, found by product keys."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.paper import Paper

PAPER = Paper("MIDUS: Memory-Infused Depth Up-Scaling", "2512.13751")


class ProductKeyMemory(nn.Module):
    """Every head's vector z = (z1, z2) is a query to `n * n` slots, whose keys are all pairs of two lists of sub-keys:

        score of slot a n + b = C1_h[a] . z1 + C2_h[b] . z2;   w = softmax of the `topk` best;   m_h = (sum w_i U_i) P_h

    The highest sums of pairs are among the pairs of each list's highest, so 2 n products find them exactly. Slot i of
    head h has the value `U_i P_h`: U [slots, value_rank] is shared by the heads (or not, `shared_values`), the
    expansion P_h [value_rank, out_dim] is each head's own, and so are the sub-keys (or not, `shared_keys`).
    `query_norm` gives queries root mean square 1 (heads' outputs are averages of values and small, the softmax over
    slots else flat); the paper leaves that open.

    U starts at 0 and P at random: the memory gives 0 at first, U learns at once, and sub-keys from the second step on.
    Train U without weight decay, which would wear rare slots away.
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        heads: int,
        key_dim: int,
        n: int = 64,
        topk: int = 8,
        value_rank: int | None = None,
        out_dim: int | None = None,
        shared_values: bool = True,
        shared_keys: bool = False,
        query_norm: bool = True,
    ):
        super().__init__()
        if heads < 1 or key_dim < 2 or key_dim % 2 or not 1 <= topk <= n:
            raise HeadwiseError(
                "ProductKeyMemory: wanted heads, an even key_dim, and topk from 1 to n; got "
                f"heads={heads}, key_dim={key_dim}, topk={topk}, n={n}."
            )
        rank, out = value_rank or key_dim, out_dim or key_dim
        self.heads, self.n, self.topk, self.query_norm = heads, n, topk, query_norm
        half = key_dim // 2
        self.sub_keys = nn.Parameter(torch.randn(2, 1 if shared_keys else heads, n, half) * half**-0.5)
        self.values = nn.Parameter(torch.zeros(1 if shared_values else heads, n * n, rank))
        self.expand = nn.Parameter(torch.randn(heads, rank, out) * rank**-0.5)

    def forward(
        self, z: Float[Tensor, "batch token heads key_dim"]
    ) -> tuple[
        Float[Tensor, "batch token heads out_dim"],
        Int[Tensor, "batch token heads topk"],
        Float[Tensor, "batch token heads topk"],
    ]:
        """What is read, from which slots, with which weights."""
        if self.query_norm:
            z = nn.functional.rms_norm(z, z.shape[-1:])
        slots, scores = self.find(z)
        weights = scores.softmax(-1)
        banks, size, rank = self.values.shape
        bank = torch.arange(self.heads, device=z.device)[:, None] * (size if banks > 1 else 0)
        rows = nn.functional.embedding_bag(
            (slots + bank).flatten(0, -2),
            self.values.view(-1, rank),
            mode="sum",
            per_sample_weights=weights.flatten(0, -2),
        )
        read = rows.view(*z.shape[:-1], rank)
        return torch.einsum("bthr,hro->btho", read, self.expand), slots, weights

    def find(
        self, z: Float[Tensor, "batch token heads key_dim"]
    ) -> tuple[Int[Tensor, "batch token heads topk"], Float[Tensor, "batch token heads topk"]]:
        """The slots of the highest scores, and these."""
        keys = self.sub_keys.expand(-1, self.heads, -1, -1)
        halves = z.unflatten(-1, (2, -1))
        scores = torch.einsum("bthcd,chnd->cbthn", halves, keys)
        (one, two), (first, second) = scores.topk(self.topk, -1)
        sums, chosen = (one[..., :, None] + two[..., None, :]).flatten(-2).topk(self.topk, -1)
        a = first.gather(-1, chosen // self.topk)
        b = second.gather(-1, chosen % self.topk)
        return a * self.n + b, sums
