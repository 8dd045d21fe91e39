"""The kernels of token-aware phase attention against float64, in the interpreter here and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from headwise.errors import HeadwiseError

pytest.importorskip("triton")
from headwise.swap.kernels.phase import phase_attention
from tests.swap.truth import DEVICE, check, drawn


def reference(q, k, v, dims, alpha, causal, offset, valid):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    i = torch.arange(q.shape[2], device=q.device)[:, None] + offset
    j = torch.arange(k.shape[2], device=q.device)
    gap = (i - j).abs().double()
    power = torch.where(gap > 0, gap**alpha, 0.0)
    phase = q[..., dims:] @ k[..., dims:].mT / math.sqrt(q.shape[-1] - dims)
    s = q[..., :dims] @ k[..., :dims].mT / math.sqrt(dims) * torch.cos(2 * math.pi * power * phase)
    seen = (j <= i) if causal else torch.ones_like(gap, dtype=torch.bool)
    seen = seen[None, None].expand(len(q), 1, -1, -1)
    if valid is not None:
        seen = seen & valid[:, None, None]
    weights = torch.softmax(s.masked_fill(~seen, float("-inf")), -1).nan_to_num()
    return weights @ v


CASES = [
    (4, 2, 37, 37, 32, 16, 16, True, 0, False),
    (2, 1, 20, 50, 24, 40, 8, True, 30, True),
    (2, 2, 33, 40, 32, 32, 16, False, 0, True),
]


def compare(case, dtype, tolerance):
    heads, kv_heads, queries, keys, dim, value_dim, dims, causal, offset, padded = case
    given, valid = drawn(heads, kv_heads, queries, keys, dim, value_dim, dtype)
    how = (dims, 0.1, causal, offset, valid if padded else None)
    check(lambda *x: phase_attention(*x, *how), lambda *x: reference(*x, *how), given, tolerance)


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case):
    compare(case, torch.float32, 2e-5 if DEVICE == "cuda" else 3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_on_the_gpu(causal, dtype):
    for queries, keys, dim in ((300, 300, 128), (129, 1000, 64), (1, 777, 128)):
        compare(
            (8, 2, queries, keys, dim, dim, dim // 2, causal, keys - queries if causal else 0, False), dtype, 1.5e-2
        )


def test_bad_sizes_are_refused():
    q = torch.zeros(1, 1, 4, 32)
    with pytest.raises(HeadwiseError, match=r"0 < amplitude_dims < dim <= 256; got 32 of 32"):
        phase_attention(q, q, q, 32)


def test_far_from_the_diagonal_the_series_is_as_good_as_the_table():
    compare((1, 1, 70, 1100, 32, 16, 16, True, 1030, False), torch.float32, 5e-6)
