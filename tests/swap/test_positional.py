"""Positional attention: one pattern for all inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headwise import swap
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, out


def made(length: int = 12, **own) -> swap.PositionalAttention:
    torch.manual_seed(0)
    return swap.PositionalAttention(DIM, HEADS, length=length, **own).double()


def test_equals_the_printed_sums():
    P = torch.randn(12, 5, dtype=torch.float64)
    layer, x = made(vectors=P), tokens()
    q, k = (P @ p.weight.T + p.bias for p in (layer.q_proj, layer.k_proj))
    v = layer.v_proj(x)
    z = [(q[:, 5 * h : 5 * h + 5] @ k[:, 5 * h : 5 * h + 5].T / 5**0.5).softmax(-1) @ v[..., 8 * h : 8 * h + 8]
         for h in range(HEADS)]  # fmt: skip
    torch.testing.assert_close(layer(x), layer.o_proj(torch.cat(z, -1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_the_pattern_is_that_of_every_input(causal: bool):
    layer, maps = made(causal=causal), []
    for seed in (1, 2):
        with attend(layer, [Map()]) as run, torch.no_grad():
            layer(tokens(1, seed=seed))
        maps.append(torch.tensor(run.tree["text"].dataset["map"].values).reshape(HEADS, 12, 12))
    assert torch.equal(*maps)
    torch.testing.assert_close(layer.pattern().to(maps[0]), maps[0], rtol=0, atol=1e-6)


def test_it_is_linear_in_its_input():
    layer, x = made(), tokens()
    at_zero = layer(torch.zeros_like(x))
    torch.testing.assert_close(layer(1000 * x) - at_zero, 1000 * (layer(x) - at_zero), rtol=0, atol=1e-9)
    q, k, _ = layer.project(x.requires_grad_(), x, layer.places(x, None, None))
    assert torch.autograd.grad((q * k).sum(), x, allow_unused=True) == (None,)


def test_equal_vectors_of_zero_weights_give_the_mean():
    layer, x = made(), tokens()
    for linear in (layer.q_proj, layer.k_proj):
        nn.init.zeros_(linear.weight)
    wanted = layer.o_proj(layer.v_proj(x).mean(1, keepdim=True)).expand_as(x)
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-12)


def test_places_and_tokens_change_together():
    layer, x, order = made(), tokens(), torch.randperm(12)
    y = layer(x)
    assert not torch.allclose(layer(x[:, order]), y[:, order])
    layer.vectors = layer.vectors[order]
    torch.testing.assert_close(layer(x[:, order]), y[:, order], rtol=0, atol=1e-12)


def test_sizes():
    layer = swap.PositionalAttention(64, 2, length=9)
    assert layer.q_proj.weight.shape == (18, 9)
    assert layer.v_proj.weight.shape == (64, 64)
    assert layer.scale == pytest.approx(1 / 3)
    with pytest.raises(HeadwiseError, match="has vectors for 9 places; got 10 tokens"):
        layer(torch.zeros(1, 10, 64))
    with pytest.raises(HeadwiseError, match=r"vectors: wanted \[place, pos_dim\]; got shape \(3,\)"):
        swap.PositionalAttention(64, 2, vectors=torch.zeros(3))


def test_in_a_trained_model():
    model = llama(64)
    site = model.model.layers[1].self_attn
    values = site.v_proj.weight.clone()
    with swap.convert(model, "positional_attention", layers=[1], length=64) as conversion:
        (layer,) = conversion.mechanisms.values()
        assert torch.equal(layer.v_proj.weight, values)
        given = dict(max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(IDS, **given), model.generate(IDS, use_cache=False, **given))
        assert not torch.isnan(out(model)).any()
