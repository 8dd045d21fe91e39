"""Softmax attention for the queries that picked a head only.

out = routed_attention(q, k, v, active, scale=0.125, causal=True)     # rows of heads that are off are 0
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.swap.kernels.phase import padded
from headwise.swap.kernels.routed_kernels import routed_forward
from headwise.swap.kernels.sigmoid import token_major


def routed_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    active: Bool[Tensor, "batch query heads"],
    scale: float,
    causal: bool = False,
    offset: int = 0,
    key_valid: Bool[Tensor, "batch key"] | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Without gradients. offset: the position of the first query, where keys count from 0."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise HeadwiseError("routed_attention has no gradients: call it under torch.no_grad().")
    if max(q.shape[-1], v.shape[-1]) > 256 or active.shape != (q.shape[0], q.shape[2], q.shape[1]):
        raise HeadwiseError(
            f"routed_attention wants heads of up to 256 dims and active of shape [batch, query, heads]; got "
            f"{tuple(q.shape)} and {tuple(active.shape)}."
        )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, dim = q.shape
    order = (~active).mT.to(torch.uint8).argsort(dim=-1, stable=True).int().contiguous()
    count = active.sum(1, dtype=torch.int32).contiguous()
    out = token_major(q, v.shape[-1]).zero_()
    exact = q.dtype == torch.float32
    small = exact or max(dim, v.shape[-1]) > 128
    rows, columns = (32, 32) if small else (128, 64)
    routed_forward[(triton.cdiv(queries, rows), batch * heads)](
        q, k, v, q if key_valid is None else key_valid.contiguous().view(torch.uint8), order, count, out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], heads, queries, k.shape[2], offset, scale,
        group=heads // k.shape[1], CAUSAL=causal, HAS_VALID=key_valid is not None, EXACT=exact, D=dim, DP=padded(dim),
        DV=v.shape[-1], DVP=padded(v.shape[-1]), BM=rows, BN=columns, num_warps=4 if small else 8, num_stages=3,
    )  # fmt: skip
    return out
