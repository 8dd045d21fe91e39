"""Multi-token attention by products of large matrices, in blocks of rows, and kernels between them; with gradients.

out = multi_token_attention(q, k, v, scale=0.125, pre_kernel=theta, causal=True)

Convolved scores are products of features (`multi_token_features.py`); a block of them, some rows of some groups of
heads, becomes weights and output in `multi_token_block.py`. Blocks are of one size: memory is linear in the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from headwise.errors import HeadwiseError
from headwise.swap.kernels.multi_token_block import BN, SIDE, WIDE, Block, Given
from headwise.swap.kernels.multi_token_features import STEP, filtered, toeplitz, unseen

Kernel = Float[Tensor, "heads c_q c_k"]
Mixing = Float[Tensor, "groups out in"]


def multi_token_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    scale: float,
    pre_kernel: Kernel | None = None,
    pre_mixing: Mixing | None = None,
    post_kernel: Kernel | None = None,
    post_mixing: Mixing | None = None,
    causal: bool = False,
    offset: int = 0,
    key_valid: Bool[Tensor, "batch key"] | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Softmax attention whose scores (`pre_`) and weights (`post_`) are convolved over queries and keys, and mixed over
    the heads of a group. offset: the position of the first query, where keys count from 0. Raises for a `post_kernel`
    over more than 33 keys and for groups of more than 64 heads."""
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    groups = next((m.shape[0] for m in (pre_mixing, post_mixing) if m is not None), heads)
    if heads // groups > 64 or (post_kernel is not None and post_kernel.shape[2] > 2 * SIDE + 1):
        raise HeadwiseError(
            f"multi_token_attention wants groups of up to 64 heads and a post_kernel over up to {2 * SIDE + 1} keys; "
            f"got {heads // groups} and {None if post_kernel is None else tuple(post_kernel.shape)}."
        )
    if key_valid is not None:
        k = k.masked_fill(~key_valid[:, None, :, None], 0.0)
    band = None
    if pre_kernel is None:
        features = F.pad(k, (0, 0, 0, -keys % STEP)).repeat_interleave(heads // k.shape[1], 1)
    else:
        features = filtered(k, pre_kernel)
        if causal and pre_kernel[0].numel() > 1:
            band = unseen(q, k, pre_kernel, offset).flatten(0, 1) * scale
    looked = features.shape[3] // dim
    v = F.pad(v, (0, 0, 0, -keys % STEP)).repeat_interleave(heads // v.shape[1], 1)
    q = F.pad(q, (0, 0, looked - 1, 0))
    tensors: list[Any] = [
        None if x is None else x.contiguous()
        for x in (
            q.flatten(0, 1), features.flatten(0, 1), v.flatten(0, 1), band, pre_mixing, matrices(post_kernel, q),
            post_mixing,
        )
    ]  # fmt: skip
    back = None if post_kernel is None else matrices(post_kernel.detach().flip(2), q)
    valid = None if key_valid is None else key_valid.contiguous().view(torch.uint8)
    settings: list[Any] = [back, valid, scale, causal, offset, queries, keys, heads, groups]
    given = Given(*tensors, *settings)
    return _MultiToken.apply(given, *tensors).unflatten(0, (batch, heads))


def matrices(kernel: Kernel | None, like: Tensor) -> Float[Tensor, "heads c_q wide narrow"] | None:
    """A convolution over keys as Toeplitz matrices."""
    if kernel is None:
        return None
    places = toeplitz(kernel.shape[2], BN, WIDE, like.device, SIDE - kernel.shape[2] // 2).to(like.dtype)
    return (kernel.to(like.dtype) @ places.flatten(1)).unflatten(2, (BN, WIDE)).mT.contiguous()


class _MultiToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, *tensors):  # type: ignore[no-untyped-def]
        out = given.q.new_empty(len(given.q), given.queries, given.v.shape[2])
        for lanes in given.lanes():
            for start, stop in given.rows():
                out[lanes, start:stop] = Block(given, lanes, start, stop).output()
        ctx.given = given
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):  # type: ignore[no-untyped-def]
        given, do = ctx.given, do.contiguous()
        grads: dict[str, Any] = {
            name: None if x is None else torch.zeros_like(x, dtype=torch.float32) for name, x in given.tensors()
        }
        for lanes in given.lanes():
            for start, stop in given.rows():
                Block(given, lanes, start, stop).back(do[lanes, start:stop], grads)
        return None, *(None if x is None else grads[name].to(x.dtype) for name, x in given.tensors())
