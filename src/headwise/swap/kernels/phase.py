"""Token-aware phase attention by kernels, with gradients.

out = phase_attention(q, k, v, amplitude_dims=64, alpha=0.1, causal=True)
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwise.errors import HeadwiseError
from headwise.swap.kernels.phase_kernels import phase_keys, phase_queries
from headwise.swap.kernels.sigmoid import token_major


def phase_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    amplitude_dims: int,
    alpha: float = 0.1,
    causal: bool = False,
    offset: int = 0,
    key_valid: Bool[Tensor, "batch key"] | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Softmax of `(qA.kA)/sqrt(A) cos(2 pi |i-j|^alpha (qP.kP)/sqrt(P))` times the values, A the first
    `amplitude_dims` of a head and P the rest. offset: the position of the first query, where keys count from 0."""
    if not 0 < amplitude_dims < q.shape[-1] or max(q.shape[-1], v.shape[-1]) > 256:
        raise HeadwiseError(
            f"phase_attention wants 0 < amplitude_dims < dim <= 256; got {amplitude_dims} of {q.shape[-1]} dims."
        )
    table = powers(q.shape[2] + offset + k.shape[2], float(alpha), q.device)
    return _Phase.apply(q, k, v, amplitude_dims, causal, int(offset), key_valid, table, float(alpha))


@lru_cache(maxsize=8)
def powers(count: int, alpha: float, device: torch.device) -> Float[Tensor, " distance"]:
    """distance^alpha, 0 at 0 for every alpha: a token is never out of phase with itself."""
    table = torch.arange(count, dtype=torch.float64) ** alpha
    table[0] = 0.0
    return table.float().to(device)


class _Phase(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dims, causal, offset, key_valid, table, alpha):  # type: ignore[no-untyped-def]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = token_major(q, v.shape[-1])
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        given = Given(q, k, v, dims, causal, offset, key_valid, table, alpha, lse)
        given.queries(None, lse, out)
        ctx.save_for_backward(out)
        ctx.given = given
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):  # type: ignore[no-untyped-def]
        (out,) = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        delta = (do.float() * out.float()).sum(-1).contiguous()
        dq, dk, dv = (token_major(x, x.shape[-1]) for x in (ctx.given.q, ctx.given.k, ctx.given.v))
        ctx.given.queries(do, delta, dq)
        ctx.given.keys(do, delta, dk, dv)
        return dq, dk, dv, *[None] * 6


class Given:
    """A call's tensors and settings, and its two kernels."""

    def __init__(self, q, k, v, dims, causal, offset, key_valid, table, alpha, lse):  # type: ignore[no-untyped-def]
        self.q, self.k, self.v, self.dims, self.table, self.lse = q, k, v, dims, table, lse
        exact, rest = q.dtype == torch.float32, q.shape[-1] - dims
        self.valid = q if key_valid is None else key_valid.contiguous().view(torch.uint8)
        self.numbers = (q.shape[1], q.shape[2], k.shape[2], offset, dims**-0.5, rest**-0.5, alpha)
        small = exact or max(q.shape[-1], v.shape[-1]) > 128
        self.kinds = dict(
            group=q.shape[1] // k.shape[1], CAUSAL=causal, HAS_VALID=key_valid is not None, EXACT=exact,
            FAST=not triton.knobs.runtime.interpret, DA=dims, DAP=padded(dims), DP=rest, DPP=padded(rest),
            DV=v.shape[-1], DVP=padded(v.shape[-1]), BM=32 if small else 64, BN=32 if small else 64,
            num_warps=4 if small else 8, num_stages=2,
        )  # fmt: skip

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.dims], x[..., self.dims :]

    def queries(self, do: Tensor | None, delta: Tensor, out: Tensor) -> None:
        batch, heads, queries, _ = self.q.shape
        given = self.v if do is None else do
        first, second = (out, out) if do is None else self.parts(out)
        kinds = self.kinds
        if do is None and kinds["BM"] == 64:
            kinds = {**kinds, "BM": 128}  # the backward has no registers left for that
        phase_queries[(triton.cdiv(queries, kinds["BM"]), batch * heads)](
            *self.parts(self.q), *self.parts(self.k), self.v, given, delta, self.lse, self.table, self.valid, first,
            second, *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *given.stride()[:3],
            *out.stride()[:3], *self.numbers, BACKWARD=do is not None, **kinds,
        )  # fmt: skip

    def keys(self, do: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
        batch, kv_heads, keys, _ = self.k.shape
        phase_keys[(triton.cdiv(keys, self.kinds["BN"]), batch * kv_heads)](
            *self.parts(self.q), *self.parts(self.k), self.v, do, delta, self.lse, self.table, self.valid,
            *self.parts(dk), dv, *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *do.stride()[:3],
            *dk.stride()[:3], *dv.stride()[:3], *self.numbers, **self.kinds,
        )  # fmt: skip


def padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
