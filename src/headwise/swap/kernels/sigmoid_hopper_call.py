"""Calls the Hopper kernels of sigmoid attention."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headwise.swap.kernels.sigmoid_hopper import sigmoid_dkv, sigmoid_dq, sigmoid_forward

LOG2E = 1.4426950408889634
BLOCK, NARROW, STAGES = 128, 64, 2


def described(x: Tensor, rows: int) -> TensorDescriptor:
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    block = [1, 1, rows, x.shape[-1]]
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, kind))


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, b: float, causal: bool, offset: int) -> None:
    batch, heads, queries, dim = q.shape
    sigmoid_forward[(batch * heads * -(-queries // BLOCK),)](
        described(q, BLOCK // 2), described(k, BLOCK), described(v, BLOCK), out, *out.stride()[:3], heads,
        heads // k.shape[1], queries, k.shape[2], offset, scale * LOG2E, b * LOG2E, CAUSAL=causal, BM=BLOCK, BN=BLOCK,
        D=dim, STAGES=STAGES, num_warps=4,
    )  # fmt: skip


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    scale: float, b: float, causal: bool, offset: int,
) -> None:  # fmt: skip
    (batch, heads, queries, dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    numbers = (heads, heads // kv_heads, queries, keys, offset, scale * LOG2E, b * LOG2E, scale)
    sigmoid_dq[(batch * heads * -(-queries // BLOCK),)](
        described(q, BLOCK // 2), described(do, BLOCK // 2), described(k, BLOCK), described(v, BLOCK), dq,
        *dq.stride()[:3], *numbers, CAUSAL=causal, BM=BLOCK, BN=BLOCK, D=dim, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    sigmoid_dkv[(batch * kv_heads * -(-keys // BLOCK),)](
        described(k, BLOCK // 2), described(v, BLOCK // 2), described(q, NARROW), described(do, NARROW), dk, dv,
        *dk.stride()[:3], *dv.stride()[:3], *numbers, CAUSAL=causal, BM=NARROW, BN=BLOCK, D=dim, STAGES=STAGES,
        num_warps=4,
    )  # fmt: skip
