"""A score whose phase depends on distance and content."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention.call import AttentionCall
from headwise.errors import HeadwiseError
from headwise.swap.kernels import fits
from headwise.swap.parts.priors import distance
from headwise.swap.parts.scores import Score


class Phase(Score):
    """`s_ij = (qA_i . kA_j) / sqrt(A) cos(2 pi |i-j|^alpha p_ij)`, A a head's first dims and P the rest ("Positional
    Encoding via Token-Aware Phase Attention", arXiv 2509.12635).

    `phase`: "quadratic", `p_ij = qP_i . kP_j / sqrt(P)`, or "linear", `p_ij = (sum qP_i + sum kP_j) / sqrt(P)`, which
    the paper found worse. `theta`: the share of A, an even number of dims. A token is in phase with itself for every
    alpha, 0 included. Phases are computed in float32 at least. Symmetric in the direction of the distance.
    """

    def __init__(self, alpha: float = 0.1, theta: float = 0.5, phase: Literal["quadratic", "linear"] = "quadratic"):
        super().__init__()
        if alpha < 0 or not 0 < theta < 1:
            raise HeadwiseError(f"Phase: wanted alpha >= 0 and 0 < theta < 1; got alpha={alpha}, theta={theta}.")
        if phase not in ("quadratic", "linear"):
            raise HeadwiseError(f"Phase: phase is quadratic or linear; got {phase!r}.")
        self.alpha, self.theta, self.phase = alpha, theta, phase

    def amplitude_dims(self, dim: int) -> int:
        dims = 2 * round(self.theta * dim / 2)
        if not 0 < dims < dim:
            raise HeadwiseError(
                f"Phase: theta={self.theta} gives {dims} of {dim} dims to the amplitude: both want some."
            )
        return dims

    def forward(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch heads key dim"],
        call: AttentionCall,
    ) -> Float[Tensor, "batch heads query key"]:
        dims = self.amplitude_dims(q.shape[-1])
        amplitude = torch.einsum("bhid,bhjd->bhij", q[..., :dims], k[..., :dims]) / math.sqrt(dims)
        q_phase, k_phase = q[..., dims:], k[..., dims:]
        if self.phase == "quadratic":
            angle = torch.einsum("bhid,bhjd->bhij", q_phase, k_phase)
        else:
            angle = q_phase.sum(-1)[..., None] + k_phase.sum(-1)[:, :, None]
        gap = distance(call)
        power = torch.where(gap > 0, gap**self.alpha, 0.0)
        return amplitude * torch.cos(2 * math.pi / math.sqrt(q_phase.shape[-1]) * power * angle)

    def has_kernel(self, call: AttentionCall) -> bool:
        return self.phase == "quadratic" and fits(call)

    def kernel(self, call: AttentionCall) -> Tensor:
        from headwise.swap.kernels.phase import phase_attention  # triton is not installed everywhere

        dims, causal = self.amplitude_dims(call.q.shape[-1]), call.mask.right == 0
        with torch.cuda.device(call.q.device):
            return phase_attention(
                call.q, call.k, call.v, dims, self.alpha, causal, call.first - call.j0, call.mask.key_valid
            )
