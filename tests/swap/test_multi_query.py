"""One key-value head for all queries, and the merging of trained ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headwise import swap
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, out


def test_equals_the_papers_sums():
    torch.manual_seed(0)
    layer, x = swap.MultiQueryAttention(DIM, HEADS, causal=True).double(), tokens()
    q = layer.q_proj.weight.view(HEADS, 8, DIM)
    k, v = x @ layer.k_proj.weight.T, x @ layer.v_proj.weight.T
    y = torch.zeros_like(x)
    for h in range(HEADS):
        for t in range(x.shape[1]):
            logits = torch.einsum("bd,bmd->bm", x[:, t] @ q[h].T, k[:, : t + 1]) / 8**0.5
            o = torch.einsum("bm,bmv->bv", logits.softmax(-1), v[:, : t + 1])
            y[:, t] += o @ layer.o_proj.weight[:, 8 * h : 8 * h + 8].T
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)


def test_equals_multi_head_attention_with_tied_heads():
    torch.manual_seed(0)
    one, many = swap.MultiQueryAttention(DIM, HEADS).double(), swap.Attention(DIM, HEADS).double()
    state = dict(one.state_dict())
    state |= {name: state[name].repeat(HEADS, 1) for name in ("k_proj.weight", "v_proj.weight")}
    many.load_state_dict(state)
    torch.testing.assert_close(one(tokens()), many(tokens()), rtol=0, atol=1e-12)
    swap.merge_kv_heads(many, 1)  # heads that are equal can be merged
    torch.testing.assert_close(one(tokens()), many(tokens()), rtol=0, atol=1e-12)


def test_the_cache_is_as_small_as_it_says():
    for kv_heads in (1, 2, 4):
        layer, cache = swap.MultiQueryAttention(DIM, HEADS, kv_heads, causal=True).double(), swap.Cache()
        with torch.no_grad():
            layer(tokens(1, 7), cache=cache)
        kept = sum(tensor.numel() for tensor in cache.of(layer).grown.values())
        assert kept == 7 * layer.cached_per_token == 7 * 2 * kv_heads * 8


@pytest.mark.parametrize("init", ["mean", "first"])
def test_merges_neighbours(init: str):
    torch.manual_seed(0)
    layer = swap.Attention(DIM, HEADS, bias=True)
    k, b = layer.k_proj.weight.view(2, 2, 8, DIM), layer.v_proj.bias.view(2, 2, 8)
    k, b = (k.mean(1), b.mean(1)) if init == "mean" else (k[:, 0], b[:, 0])
    swap.merge_kv_heads(layer, 2, init)
    torch.testing.assert_close(layer.k_proj.weight, k.flatten(0, 1))
    torch.testing.assert_close(layer.v_proj.bias, b.flatten())
    assert layer.kv_heads == 2
    assert layer.k_proj.out_features == 16


def test_random_weights_are_as_large_as_those_they_stand_for():
    layer = swap.Attention(64, 8)
    std = layer.k_proj.weight.std()
    swap.merge_kv_heads(layer, 1, "random")
    assert layer.k_proj.weight.std().item() == pytest.approx(std.item(), rel=0.2)
    assert layer.k_proj.weight.shape == (8, 64)


def test_in_a_trained_model():
    model = llama(64)
    plain = out(model)
    with swap.convert(model, "multi_query_attention", kv_heads=2):
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)
    with swap.convert(model, "multi_query_attention", init="first") as conversion:
        (first, _) = conversion.mechanisms.values()
        assert isinstance(first.k_proj, nn.Linear)
        assert first.kv_heads == 1
        original = model.model.layers[0].self_attn.mechanism
        assert original is first
        assert not torch.allclose(out(model), plain)
        given = dict(max_new_tokens=4, do_sample=False)
        cached = model.generate(IDS, **given)
        assert torch.equal(cached, model.generate(IDS, use_cache=False, **given))


def test_bad_input():
    layer = swap.Attention(DIM, HEADS)
    with pytest.raises(HeadwiseError, match=r"kv_heads: the layer has 4 key-value heads; wanted a divisor; got 3"):
        swap.merge_kv_heads(layer, 3)
    with pytest.raises(HeadwiseError, match=r"init: wanted mean, first or random; got 'svd'"):
        swap.merge_kv_heads(layer, 2, "svd")
