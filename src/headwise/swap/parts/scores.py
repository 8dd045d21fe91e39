"""Score functions: a number for every query and key."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention.call import AttentionCall


class Score(nn.Module):
    """The scaled dot product; the base of the others.

    A score function knows nothing of masks. Whatever it learns for single heads it indexes by `call.head_ids`.
    """

    local = True
    """A score needs its own query, key and head alone."""

    def forward(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch heads key dim"],
        call: AttentionCall,
    ) -> Float[Tensor, "batch heads query key"]:
        return torch.einsum("bhid,bhjd->bhij", q, k) * call.scale

    @property
    def plain(self) -> bool:
        """Whether this is the scaled dot product, which libraries have kernels for."""
        return type(self) is Score

    def has_kernel(self, call: AttentionCall) -> bool:
        """Whether `kernel` can do this call, the softmax of these scores."""
        return False

    def kernel(self, call: AttentionCall) -> Float[Tensor, "batch heads query value_dim"]:
        """The output by a kernel of the score's own, with gradients."""
        raise TypeError(f"{type(self).__name__} has no kernel.")

    def flops(self, queries: int, keys: int, heads: int, dim: int) -> int:
        """Floating-point operations of all scores."""
        return 2 * queries * keys * heads * dim


class Additive(Score):
    """`s_ij = w . tanh(A q_i + C k_j)` ("Neural Machine Translation by Jointly Learning to Align and Translate",
    arXiv 1409.0473), shared by the heads."""

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or dim
        self.a, self.c = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden)
        self.w = nn.Linear(hidden, 1, bias=False)

    def forward(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch heads key dim"],
        call: AttentionCall,
    ) -> Float[Tensor, "batch heads query key"]:
        pair = self.a(q)[:, :, :, None] + self.c(k)[:, :, None]
        return self.w(torch.tanh(pair))[..., 0]

    def flops(self, queries: int, keys: int, heads: int, dim: int) -> int:
        hidden = self.w.in_features
        return heads * (2 * (queries + keys) * dim * hidden + 4 * queries * keys * hidden)


class Cosine(Score):
    """`s_ij = tau cos(q_i, k_j)`, tau learned, positive, one for all heads ("Swin Transformer V2", arXiv 2111.09883,
    without its position bias)."""

    def __init__(self, tau: float = 10.0):
        super().__init__()
        self.log_tau = nn.Parameter(torch.tensor(float(tau)).log())

    def forward(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch heads key dim"],
        call: AttentionCall,
    ) -> Float[Tensor, "batch heads query key"]:
        unit_q, unit_k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        return self.log_tau.exp() * torch.einsum("bhid,bhjd->bhij", unit_q, unit_k)
