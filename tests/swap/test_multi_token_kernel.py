"""The kernels of multi-token attention against float64, in the interpreter here and on a GPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from headwise import swap
from headwise.attention import attend
from headwise.errors import HeadwiseError
from headwise.swap import multi_token

pytest.importorskip("triton")
from headwise.swap.kernels import multi_token_block
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
    ((2, 1, 37, 37, 16, 8), CAUSAL, SCORES),
    ((4, 2, 30, 30, 8, 8), CAUSAL, ALL),
    ((2, 2, 20, 90, 8, 8), (True, 70, True), ALL),
    ((2, 2, 33, 40, 8, 8), (False, 0, True), ALL),
    ((2, 2, 40, 40, 8, 8), PADDED, WEIGHTS),
    ((4, 4, 30, 30, 8, 8), CAUSAL, (0, 1, 0, 0)),
    ((4, 4, 30, 30, 8, 8), CAUSAL, (0, 0, 0, 1)),
]


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case):
    compare(*case, torch.float32, 5e-6)


@pytest.mark.parametrize("case", [((2, 1, 68, 68, 8, 8), CAUSAL, ALL), ((1, 1, 68, 68, 8, 8), PADDED, SCORES)])
def test_blocks_of_rows_and_heads_add_up(case, monkeypatch):
    monkeypatch.setattr(multi_token_block, "PLACES", 1)
    monkeypatch.setattr(multi_token_block, "LEAST", 64)
    compare(*case, torch.float32, 5e-6, each=case[0][0])


def test_what_it_does_not_know_is_refused():
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(HeadwiseError, match=r"over up to 33 keys; got 1 and \(1, 2, 35\)"):
        multi_token_attention(q, q, q, 1.0, post_kernel=torch.zeros(1, 2, 35))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("which", [SCORES, ALL])
def test_on_the_gpu(which, dtype):
    tolerance = 5e-6 if dtype == torch.float32 else 1.5e-2
    for shape, how in (
        ((4, 2, 1100, 1100, 128, 128), CAUSAL),
        ((4, 2, 129, 1000, 64, 64), (True, 871, True)),
        ((4, 4, 333, 222, 64, 128), (False, 0, True)),
    ):
        compare(shape, how, which, dtype, tolerance, taps=(6, 11), each=4)


@pytest.mark.parametrize("causal", [True, False])
def test_a_layer_equals_the_whole_matrix(causal, monkeypatch):
    monkeypatch.setattr(multi_token, "FUSED_PLACES", 100)
    if DEVICE == "cpu":
        monkeypatch.setattr(multi_token, "fits", lambda call: True)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    torch.manual_seed(0)
    layer = swap.MultiTokenAttention(32, 4, kv_heads=2, causal=causal, position=swap.Rope(), c_q=3, c_k=5).to(DEVICE)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "kernel" in name or "mixing" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 24, 32, device=DEVICE)
    mask = torch.ones(2, 24, dtype=torch.bool, device=DEVICE)
    mask[0, :3] = False

    def run():
        with attend(layer) as run:
            y = layer(x, mask=mask)[:, 3:]
        ((path, _),) = run.paths.values()
        return path, [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]

    path, got = run()
    with torch.no_grad():
        cache = swap.Cache()
        parts = [layer(part, cache=cache) for part in x.split([20, 1, 3], 1)] if causal else [layer(x)]
    monkeypatch.setattr(multi_token, "FUSED_PLACES", 2**30)
    other, wanted = run()
    assert (path, other) == ("kernel", "dense")
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * b.abs().max().item())
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=0, atol=1e-5)
