"""The kernels of multi-token attention against float64, in the interpreter here and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from headwise.swap.kernels.multi_token import multi_token_attention
from tests.swap.truth import DEVICE, check, drawn


def learned(heads, each, c_q, c_k, dtype, which):
    """Kernels and mixing matrices, away from the identity; None where not asked for."""
    generator = torch.Generator().manual_seed(1)
    kernel, mixing = torch.zeros(heads, c_q, c_k), torch.eye(each).repeat(heads // each, 1, 1)
    kernel[:, -1, c_k // 2] = 1.0
    made = [
        (x + 0.2 * torch.randn(x.shape, generator=generator)).to(DEVICE, dtype).requires_grad_()
        for x in (kernel, mixing, kernel, mixing)
    ]
    return [x if on else None for x, on in zip(made, which)]


def convolved(x, kernel, seen):
    if kernel is None:
        return x
    c_q, c_k = kernel.shape[1:]
    return F.conv2d(F.pad(x * seen, (c_k // 2, c_k // 2, c_q - 1, 0)), kernel[:, None], groups=len(kernel))


def mixed(x, mixing):
    if mixing is None:
        return x
    return torch.einsum("goc,bgcij->bgoij", mixing, x.unflatten(1, mixing.shape[:2])).flatten(1, 2)


def reference(q, k, v, pre_kernel, pre_mixing, post_kernel, post_mixing, scale, causal, offset, valid):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        seen = torch.arange(k.shape[2], device=q.device) <= torch.arange(q.shape[2], device=q.device)[:, None] + offset
    seen = seen[None, None].expand(len(q), 1, -1, -1)
    if valid is not None:
        seen = seen & valid[:, None, None]
    s = mixed(convolved(q @ k.mT * scale, pre_kernel, seen), pre_mixing)
    a = torch.softmax(s.masked_fill(~seen, float("-inf")), -1).nan_to_num()
    return mixed(convolved(a, post_kernel, seen) * seen, post_mixing) @ v


def compare(shape, how, which, dtype, tolerance, taps=(3, 5), each=2):
    heads, kv_heads, queries, keys, dim, value_dim = shape
    causal, offset, padded = how
    given, valid = drawn(heads, kv_heads, queries, keys, dim, value_dim, dtype)
    own = learned(heads, each, *taps, dtype, which)
    there = [x for x in own if x is not None]

    def spread(own):
        rest = iter(own)
        return [next(rest) if on else None for on in which]

    how = (causal, offset, valid if padded else None)
    check(
        lambda q, k, v, *own: multi_token_attention(q, k, v, dim**-0.5, *spread(own), *how),
        lambda q, k, v, *own: reference(q, k, v, *spread(own), dim**-0.5, *how),
        [*given, *there],
        tolerance,
    )


CAUSAL, FULL, PADDED = (True, 0, False), (False, 0, False), (True, 0, True)
ALL, SCORES, WEIGHTS = (1, 1, 1, 1), (1, 0, 0, 0), (0, 0, 1, 0)
CASES = [
    ((2, 1, 70, 70, 16, 8), CAUSAL, SCORES),
    ((4, 2, 37, 37, 8, 8), CAUSAL, ALL),
    ((2, 2, 20, 90, 8, 8), (True, 70, True), ALL),
    ((2, 2, 33, 40, 8, 8), (False, 0, True), ALL),
    ((2, 2, 40, 40, 8, 8), PADDED, WEIGHTS),
    ((4, 4, 30, 30, 8, 8), CAUSAL, (0, 1, 0, 0)),
    ((4, 4, 30, 30, 8, 8), CAUSAL, (0, 0, 0, 1)),
]


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case):
    compare(*case, torch.float32, 5e-6)
