"""The kernels of sigmoid attention against float64: in Triton's interpreter here, on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from headwise.errors import HeadwiseError

pytest.importorskip("triton")
from headwise.swap.kernels.sigmoid import sigmoid_attention
from tests.swap.truth import check, drawn


def reference(q, k, v, scale, b, causal, offset, valid):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        seen = torch.arange(k.shape[2], device=q.device) <= torch.arange(q.shape[2], device=q.device)[:, None] + offset
    seen = seen[None, None].expand(len(q), 1, -1, -1)
    if valid is not None:
        seen = seen & valid[:, None, None]
    return (torch.sigmoid(q @ k.mT * scale + b) * seen) @ v


CASES = [
    (4, 2, 37, 37, 16, 16, True, 0, False),
    (2, 2, 20, 50, 24, 40, True, 30, True),
    (2, 1, 33, 70, 64, 64, False, 0, True),
]


def compare(case, dtype, tolerance):
    heads, kv_heads, queries, keys, dim, value_dim, causal, offset, padded = case
    given, valid = drawn(heads, kv_heads, queries, keys, dim, value_dim, dtype)
    how = (dim**-0.5, -1.3, causal, offset, valid if padded else None)
    check(lambda *x: sigmoid_attention(*x, *how), lambda *x: reference(*x, *how), given, tolerance)


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case):
    compare(case, torch.float32, 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_on_the_gpu(causal, dim, dtype):
    for queries, keys in ((300, 300), (129, 1000), (1, 777)):
        compare((8, 2, queries, keys, dim, dim, causal, keys - queries if causal else 0, False), dtype, 5e-3)


def test_what_it_does_not_know_is_refused():
    q = torch.zeros(1, 1, 4, 300)
    with pytest.raises(HeadwiseError, match=r"heads of up to 256 dims.*got \(1, 1, 4, 300\)"):
        sigmoid_attention(q, q, q, 1.0, 0.0)
