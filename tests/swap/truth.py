"""Inputs for the kernels' tests, and their comparison with float64: output and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(heads, kv_heads, queries, keys, dim, value_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, dim), (2, kv_heads, keys, dim), (2, kv_heads, keys, value_dim)]
    given = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    return given, (torch.rand(2, keys, generator=generator) > 0.3).to(DEVICE)


def check(kernel: Callable, reference: Callable, given: Sequence[torch.Tensor], tolerance: float) -> None:
    out = kernel(*given)
    weight = torch.randn_like(out)
    true = [x.detach().double().requires_grad_() for x in given]
    wanted = reference(*true)
    pairs = [(out, wanted)]
    pairs += zip(torch.autograd.grad(out, given, weight), torch.autograd.grad(wanted, true, weight.double()))
    for got, truth in pairs:
        assert (got.double() - truth).norm() / truth.norm() < tolerance
