"""Sigmoid attention: softmax replaced by a sigmoid with a constant bias, with what keeps it stable around it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.models.anatomy import Site
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads
from headwise.swap.parts.positions import Position, Rope
from headwise.swap.parts.sigmoid import Sigmoid


class SigmoidAttention(Attention):
    """`y_i = sum_j sigmoid(q_i . k_j / sqrt(d) + b) v_j`, with the paper's advice: `b` near -ln(training length) (see
    `Sigmoid`; with rotary positions about -10 works as well), `qk_norm` before the rotation, `layer_scale` (1e-4 for
    images: a learned factor of every output channel that starts there) and `out_norm` (for contexts of 4,096 tokens and
    more: RMSNorm of the output).

    In a trained softmax model `b="match"` is the default, and `qk_norm` is off: the output at step 0 is near the
    model's where weights are small, and not equal (p becomes p / (1 + p)).
    """

    paper: ClassVar[Paper] = Paper("Theory, Analysis, and Best Practices for Sigmoid Self-Attention", "2409.04431")
    what: ClassVar[str] = "every key weighted by itself, by a sigmoid with a bias"

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        b: float | Literal["auto", "match"] = "auto",
        temperature: float = 0.0,
        divide: Literal["count", "sqrt"] | None = None,
        qk_norm: bool = True,
        layer_scale: float | None = None,
        out_norm: bool = False,
        position: Position | None = None,
        **parts: Any,
    ):
        super().__init__(
            dim, heads, kv_heads, head_dim, qk_norm=qk_norm, position=position or Rope(),
            normaliser=Sigmoid(b, temperature, divide), **parts,
        )  # fmt: skip
        self.out_norm: nn.Module = nn.RMSNorm(dim, eps=1e-6) if out_norm else nn.Identity()
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))

    def combine(self, z: Heads, x: Float[Tensor, "batch query dim"]) -> Float[Tensor, "batch query dim"]:
        y = self.out_norm(super().combine(z, x))
        return y if self.layer_scale is None else y * self.layer_scale

    @classmethod
    def from_site(cls, site: Site, causal: bool, **own: Any) -> Self:
        return super().from_site(site, causal, **{"b": "match", "qk_norm": False, **own})
