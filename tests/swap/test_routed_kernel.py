"""The kernel that skips heads against plain attention times the choice, in the interpreter and on the GPU."""

from __future__ import annotations

import pytest
import torch

from headwise import swap
from headwise.errors import HeadwiseError

pytest.importorskip("triton")
from headwise.swap.kernels.routed import routed_attention
from tests.swap.truth import DEVICE, drawn


def compare(heads, kv_heads, queries, keys, dim, causal, padded, dtype, tolerance):
    (q, k, v), valid = drawn(heads, kv_heads, queries, keys, dim, dim, dtype)
    offset = keys - queries if causal else 0
    active = torch.rand(2, queries, heads, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.6
    active[..., 0], active[:, :, 1] = True, False
    with torch.no_grad():
        out = routed_attention(q, k, v, active, dim**-0.5, causal, offset, valid if padded else None)
        seen = torch.ones(2, 1, queries, keys, dtype=torch.bool, device=DEVICE)
        if causal:
            seen = seen.tril(offset)
        if padded:
            seen = seen & valid[:, None, None]
        q, k, v = (x.double() for x in (q, k, v))
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        s = (q @ k.mT * dim**-0.5).masked_fill(~seen, float("-inf"))
        wanted = (torch.softmax(s, -1).nan_to_num() @ v) * active.mT[..., None]
    assert torch.equal(out != 0, (wanted != 0)) or padded
    assert (out.double() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("causal,padded", [(True, False), (False, True), (True, True)])
def test_heads_that_are_off_are_left_out(causal, padded):
    compare(4, 2, 40, 70, 16, causal, padded, torch.float32, 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_on_the_gpu(causal):
    for queries, keys in ((300, 300), (129, 1000)):
        compare(8, 2, queries, keys, 128, causal, False, torch.bfloat16, 5e-3)


def test_bad_input_is_refused():
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(HeadwiseError, match=r"active of shape \[batch, query, heads\]; got .* and \(1, 2, 4\)"):
        routed_attention(q, q, q, torch.ones(1, 2, 4, dtype=torch.bool), 1.0)
    with pytest.raises(HeadwiseError, match=r"has no gradients"):
        routed_attention(q.requires_grad_(), q, q, torch.ones(1, 4, 2, dtype=torch.bool), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("router", ["learned", "qnorm"])
def test_a_layer_that_skips_heads_gives_what_it_gives_with_all_of_them(router, monkeypatch):
    monkeypatch.setattr("headwise.swap.mixture_of_head.LONG", 1)
    torch.manual_seed(0)
    layer = swap.MixtureOfHeadAttention(256, 4, causal=True, router=router, shared=1, topk=1).cuda().eval()
    x = torch.randn(2, 300, 256, device="cuda")
    whole = layer(x).detach()  # with gradients all heads are computed
    with torch.no_grad():
        assert (layer(x) - whole).norm() / whole.norm() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sigmoid_attention", "token_aware_phase_attention"])
def test_a_layer_with_a_kernel_gives_what_it_gives_without(name):
    torch.manual_seed(0)
    layer = swap.make(name, 256, 4, causal=True).cuda().train()
    x = torch.randn(2, 300, 256, device="cuda", requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        quick = layer(x)
        (grad,) = torch.autograd.grad(quick.sum(), x)
        patch.setattr("headwise.swap.attention.PartsForm.has_kernel", lambda self, call: False)
        slow = layer(x)
        (wanted,) = torch.autograd.grad(slow.sum(), x)
    assert (quick - slow).norm() / slow.norm() < 1e-3
    assert (grad - wanted).norm() / wanted.norm() < 1e-3
