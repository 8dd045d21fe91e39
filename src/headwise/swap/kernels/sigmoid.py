"""Sigmoid attention by kernels, with gradients: which kernel can do a call, and the call.

out = sigmoid_attention(q, k, v, scale=0.125, b=-8.3, causal=True)
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwise.errors import HeadwiseError
from headwise.swap.kernels.sigmoid_portable import key_side, query_side


def sigmoid_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    scale: float,
    b: float,
    causal: bool = False,
    offset: int = 0,
    key_valid: Bool[Tensor, "batch key"] | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """`sum_j sigmoid(scale q_i.k_j + b) v_j` over the keys a query sees. offset: the position of the first query, where
    keys count from 0. Raises for heads wider than 256 dims and for other types than float32, bfloat16 and float16."""
    if max(q.shape[-1], v.shape[-1]) > 256 or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise HeadwiseError(
            f"sigmoid_attention knows heads of up to 256 dims in float32, bfloat16 and float16; got {tuple(q.shape)}, "
            f"{q.dtype}."
        )
    return _Sigmoid.apply(q, k, v, float(scale), float(b), causal, int(offset), key_valid)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, b, causal, offset, key_valid):  # type: ignore[no-untyped-def]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        ctx.save_for_backward(q, k, v, key_valid)
        ctx.settings = scale, b, causal, offset
        out = token_major(q, v.shape[-1])
        if on_hopper(q, k, v, key_valid):
            from headwise.swap.kernels.sigmoid_hopper_call import forward

            forward(q, k, v, out, scale, b, causal, offset)
        else:
            by_queries(q, k, v, None, out, key_valid, *ctx.settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):  # type: ignore[no-untyped-def]
        q, k, v, key_valid = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        dq, dk, dv = (token_major(x, x.shape[-1]) for x in (q, k, v))
        if on_hopper(q, k, v, key_valid, do):
            from headwise.swap.kernels.sigmoid_hopper_call import backward

            backward(q, k, v, do, dq, dk, dv, *ctx.settings)
        else:
            by_queries(q, k, v, do, dq, key_valid, *ctx.settings)
            by_keys(q, k, v, do, dk, dv, key_valid, *ctx.settings)
        return dq, dk, dv, *[None] * 5


def token_major(like: Tensor, dim: int) -> Tensor:
    """[batch, heads, token, dim], laid out so that a token's heads lie together."""
    batch, heads, tokens = like.shape[:3]
    return torch.empty((batch, tokens, heads, dim), dtype=like.dtype, device=like.device).transpose(1, 2)


def on_hopper(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, do: Tensor | None = None) -> bool:
    """Whether the Hopper kernels can do this call."""
    given = [x for x in (q, k, v, do) if x is not None]
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and key_valid is None
        and q.dtype != torch.float32
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in (64, 128)
        and not any(x.data_ptr() % 16 or any(s % 8 for s in x.stride()[:-1]) for x in given)
    )


def blocks(q: Tensor, v: Tensor) -> dict[str, int | bool]:
    """Sizes of the portable kernels' blocks."""
    wide, exact = max(q.shape[-1], v.shape[-1]), q.dtype == torch.float32
    small = wide > 128 or exact
    return dict(
        EXACT=exact, D=q.shape[-1], DP=max(16, triton.next_power_of_2(q.shape[-1])), DV=v.shape[-1],
        DVP=max(16, triton.next_power_of_2(v.shape[-1])), BM=32 if small else 64, BN=32 if small else 64,
    )  # fmt: skip


def by_queries(q, k, v, do, out, key_valid, scale, b, causal, offset) -> None:  # type: ignore[no-untyped-def]
    batch, heads, queries, _ = q.shape
    sizes = blocks(q, v)
    given, valid = v if do is None else do, q if key_valid is None else key_valid.contiguous().view(torch.uint8)
    query_side[(triton.cdiv(queries, sizes["BM"]), batch * heads)](
        q, k, v, given, valid, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *given.stride()[:3],
        *out.stride()[:3], heads, queries, k.shape[2], offset, scale, b, group=heads // k.shape[1], CAUSAL=causal,
        HAS_VALID=key_valid is not None, BACKWARD=do is not None, **sizes,
    )  # fmt: skip


def by_keys(q, k, v, do, dk, dv, key_valid, scale, b, causal, offset) -> None:  # type: ignore[no-untyped-def]
    (batch, heads, queries, _), (kv_heads, keys) = q.shape, k.shape[1:3]
    sizes = blocks(q, v)
    valid = q if key_valid is None else key_valid.contiguous().view(torch.uint8)
    key_side[(triton.cdiv(keys, sizes["BN"]), batch * kv_heads)](
        q, k, v, do, valid, dk, dv, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
        *dk.stride()[:3], *dv.stride()[:3], heads, queries, keys, offset, scale, b, group=heads // kv_heads,
        CAUSAL=causal, HAS_VALID=key_valid is not None, **sizes,
    )  # fmt: skip
