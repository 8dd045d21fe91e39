"""Heads of a fixed width, and widening heads without changing the output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headwise import swap
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, gpt2, out, qwen3


def test_equals_pytorchs_at_the_standard_width():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    ours = swap.FixedHeadAttention(DIM, HEADS, head_dim=DIM // HEADS, bias=True).double()
    weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    with torch.no_grad():
        for linear, weight, bias in zip((ours.q_proj, ours.k_proj, ours.v_proj), weights, biases, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    ours.o_proj = theirs.out_proj
    torch.testing.assert_close(ours(tokens()), theirs(*[tokens()] * 3)[0], rtol=0, atol=1e-12)


def test_width_does_not_depend_on_the_heads():
    assert [swap.FixedHeadAttention(DIM, heads).head_dim for heads in (1, 4, 32)] == [128] * 3
    assert swap.FixedHeadAttention(64, 8, head_dim=48).parameter_count == 4 * 64 * 8 * 48


@pytest.mark.parametrize("value_dim", [None, 8])
@pytest.mark.parametrize("own", [{"bias": True}, {"kv_heads": 2, "position": swap.Rope()}, {"qk_norm": True}])
def test_widening_keeps_the_function(own: dict, value_dim: int | None):
    torch.manual_seed(0)
    layer, x = swap.Attention(DIM, HEADS, causal=True, **own).double(), tokens()
    plain = layer(x)
    swap.widen_heads(layer, 24, value_dim)
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-12)
    assert layer.q_proj.weight.shape == (HEADS * 24, DIM)
    assert layer.o_proj.weight.shape == (DIM, HEADS * (value_dim or 24))
    layer(x).square().sum().backward()
    new = layer.k_proj.weight.grad.unflatten(0, (layer.kv_heads, 24))[:, 8:]
    assert (new.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("make", [llama, qwen3, gpt2])
def test_in_a_trained_model(make):
    model = make()
    plain = out(model)
    with swap.convert(model, "fixed_head_attention", head_dim=32) as conversion:
        assert {m.head_dim for m in conversion.mechanisms.values()} == {32}
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)


def test_generates_the_same_and_comes_back_from_disk(tmp_path):
    model = llama(64)
    plain = model.generate(IDS, max_new_tokens=5, do_sample=False)
    with swap.convert(model, "fixed_head_attention", head_dim=16) as conversion:
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), plain)
        wanted = out(model)
        conversion.save(tmp_path)
    assert torch.equal(out(swap.load(tmp_path)), wanted)


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"wanted at least the 8 and 8 there are; got 4, 4"):
        swap.widen_heads(swap.Attention(DIM, HEADS), 4)
    layer = swap.Attention(DIM, HEADS)
    layer.o_proj = nn.Identity()
    with pytest.raises(HeadwiseError, match=r"the host keeps this layer's output projection"):
        swap.widen_heads(layer, 16)
