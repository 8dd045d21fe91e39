"""A call of the fused kernels, and what they give back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.attention.fused_runs import SEGMENTS

WANTS = frozenset({"mass", "entropy", "segment_entropy", "distance", "top"})


@dataclass
class FusedResult:
    """Statistics are float32; rows that see no key are 0, with lse = -inf and top_index = -1."""

    lse: Float[Tensor, "batch heads query"]
    out: Float[Tensor, "batch heads query value_dim"] | None = None
    mass: Float[Tensor, "batch heads query segment"] | None = None
    entropy: Float[Tensor, "batch heads query"] | None = None
    segment_entropy: Float[Tensor, "batch heads query segment"] | None = None
    distance: Float[Tensor, "batch heads query"] | None = None
    distance_sq: Float[Tensor, "batch heads query"] | None = None
    top_value: Float[Tensor, "batch heads query"] | None = None
    top_index: Int[Tensor, "batch heads query"] | None = None
    path: str = ""


@dataclass
class FusedCall:
    """What an attention call is made of; see `fused_attention` for the arguments."""

    q: Float[Tensor, "batch heads query dim"]
    k: Float[Tensor, "batch kv_heads key dim"]
    v: Float[Tensor, "batch kv_heads key value_dim"] | None
    scale: float
    causal: bool = False
    query_offset: int = 0
    positions: Int[Tensor, " query"] | None = None
    window: tuple[int | None, int | None] | None = None
    key_valid: Bool[Tensor, "batch key"] | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None
    key_labels: Int[Tensor, "#batch key"] | None = None
    query_labels: Int[Tensor, "#batch query"] | None = None
    segments: int = 0
    bias_table: Float[Tensor, "heads query_segment segment"] | None = None
    key_bias: Float[Tensor, "#heads key"] | None = None
    want: frozenset[str] = frozenset()

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """Left and right: i - j <= left, j - i <= right."""
        left, right = self.window or (None, None)
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    @property
    def labelled(self) -> bool:
        """Whether the segments matter."""
        return bool(self.want & {"mass", "segment_entropy"}) or self.bias_table is not None

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


def supports(call: FusedCall) -> tuple[bool, str]:
    """Whether the kernels can do this call, and if not, why."""
    wide = call.q.shape[-1] if call.v is None else max(call.q.shape[-1], call.v.shape[-1])
    if call.q.device.type != "cuda" and not interpreted():
        return False, f"the fused kernels need a GPU; the tensors are on {call.q.device.type}"
    if call.q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False, f"the fused kernels know bfloat16, float16 and float32, not {call.q.dtype}"
    if wide > 256:
        return False, f"the fused kernels know heads of up to 256 dimensions, not {wide}"
    if call.segments > SEGMENTS:
        return False, f"the fused kernels keep up to {SEGMENTS} segments, not {call.segments}"
    if any(x is not None and x.requires_grad for x in (call.q, call.k, call.v)) and torch.is_grad_enabled():
        return False, "the fused kernels have no backward pass"
    return True, ""


def interpreted() -> bool:
    return triton.knobs.runtime.interpret
