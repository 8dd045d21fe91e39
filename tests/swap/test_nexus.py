"""Nexus in its three readings against a loop over heads, and where it is plain attention."""

from __future__ import annotations

import pytest
import torch

from headwise import swap
from headwise.attention import Map, attend
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, out, qwen3

INNER = ["qkv", "self", "full"]


def made(**own) -> swap.NexusAttention:
    torch.manual_seed(0)
    return swap.NexusAttention(DIM, HEADS, causal=True, **own).double()


def mixed(q: torch.Tensor, k: torch.Tensor, what: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / 8**0.5).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf")).softmax(-1) @ what


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("inner", INNER)
def test_equals_a_loop(inner: str, order: int):
    layer, x = made(inner=inner, order=order), tokens(1)
    (rows,) = x
    heads = [slice(8 * h, 8 * h + 8) for h in range(HEADS)]
    W_Q, W_K, W_V = (p.weight.T for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    Q, K, V = ([rows @ w[:, h] for h in heads] for w in (W_Q, W_K, W_V))
    for _ in range(order - 1):
        if inner == "qkv":
            Q, K = ([mixed(q, k, what) for q, k, what in zip(Q, K, kind, strict=True)] for kind in (Q, K))
        elif inner == "self":
            Q, K = ([mixed(q, q, q) for q in kind] for kind in (Q, K))
        else:
            z = torch.cat([mixed(q, k, v) for q, k, v in zip(Q, K, V, strict=True)], 1)
            Q, K = ([z @ w[:, h] for h in heads] for w in (W_Q, W_K))
    z = torch.cat([mixed(q, k, v) for q, k, v in zip(Q, K, V, strict=True)], 1)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(z), rtol=0, atol=1e-12)


def test_inner_layers_of_their_own():
    layer, x = made(shared=False), tokens(1)
    parts = []
    for inner in (layer.inner_q, layer.inner_k):
        q, k, v = (p(x[0]).split(8, 1) for p in (inner.q, inner.k, inner.v))
        parts.append([mixed(*head) for head in zip(q, k, v, strict=True)])
    v = layer.v_proj(x[0]).split(8, 1)
    z = torch.cat([mixed(*head) for head in zip(*parts, v, strict=True)], 1)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(z), rtol=0, atol=1e-12)


def test_inner_layers_of_their_own_leave_no_parameter_idle():
    model = llama()
    with swap.convert(model, "nexus_attention", shared=False, gate=None) as conversion:
        (layer, *_) = conversion.mechanisms.values()
        assert not hasattr(layer, "q_proj")
        model(torch.arange(4, 9)[None])[0].sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("own", [{"order": 1}, {"gate": 0.0}, {"gate": 0.0, "inner": "self", "order": 3}])
def test_is_plain_attention(own: dict):
    own = own | {"kv_heads": 2, "position": swap.Rope()}
    layer, plain = made(**own), swap.Attention(DIM, HEADS, 2, causal=True, position=swap.Rope()).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(tokens()), plain(tokens()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner,maps", [("qkv", 1), ("self", 2)])
def test_where_inner_maps_are_the_identity_it_is_plain_attention(inner: str, maps: int):
    layer = made(inner=inner, position=swap.Rope())
    plain = swap.Attention(DIM, HEADS, causal=True, position=swap.Rope()).double()
    plain.load_state_dict(layer.state_dict())
    attend, calls = layer.attend, []

    def alone_within(q, k, v, mask, here, inner):
        calls.append(inner)
        return attend(q, k, v, Mask(left=0, right=0) if inner else mask, here)

    layer.attend = alone_within
    torch.testing.assert_close(layer(tokens()), plain(tokens()), rtol=0, atol=1e-12)
    assert calls == [True] * maps + [False]


@pytest.mark.parametrize("inner", INNER)
def test_the_score_of_a_pair_depends_on_third_tokens(inner: str):
    """Odds of two keys for the last query: of plain attention they know nothing of other tokens."""
    x = tokens(1, 5)
    for layer, moves in ((made(inner=inner), True), (swap.Attention(DIM, HEADS, causal=True).double(), False)):
        odds = []
        for factor in (1.0, 2.0):
            y = x.clone()
            y[:, 1] *= factor
            with attend(layer, [Map()]) as run, torch.no_grad():
                layer(y)
            last = torch.tensor(run.tree["text"].dataset["map"].values)[..., -1, :].reshape(-1, 5)
            odds.append(last[-HEADS:, 3] / last[-HEADS:, 2])
        assert torch.allclose(odds[0], odds[1], rtol=1e-6) is not moves


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("make", [llama, qwen3])
def test_in_a_trained_model(make, inner: str):
    model = make()
    if inner == "full" and make is qwen3:
        with pytest.raises(HeadwiseError, match=r"heads \* value_dim must be dim 32; got 4 \* 16"):
            swap.convert(model, "nexus_attention", inner=inner)
        return
    plain = out(model)
    with swap.convert(model, "nexus_attention", inner=inner) as conversion:
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)
        layers = conversion.mechanisms.values()
        model(IDS, labels=IDS).loss.backward()
        assert all(layer.gate.grad.abs().min() > 0 for layer in layers)
        with torch.no_grad():
            for layer in layers:
                layer.gate.fill_(1.0)
        assert not torch.allclose(out(model), plain)


def test_bad_settings_are_refused():
    with pytest.raises(HeadwiseError, match=r"order is at least 1, inner is qkv, self or full; got order=0"):
        made(order=0)
    with pytest.raises(HeadwiseError, match=r"shared=False\) is of order 2; got order=3"):
        made(order=3, shared=False)
    with pytest.raises(HeadwiseError, match="leave out context"):
        made()(tokens(), context=tokens())
