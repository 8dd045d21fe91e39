"""Optimised, Efficient and Super attention: against loops, their limit cases, and conversion where nothing is lost."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from headwise import swap
from headwise.attention import Map, attend
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, LENGTH, tokens

KINDS = [swap.OptimisedAttention, swap.EfficientAttention, swap.SuperAttention]


def by_loops(layer: swap.OptimisedAttention, x: torch.Tensor) -> torch.Tensor:
    """Head by head and row by row, from the formulas."""
    n, width = len(x), layer.head_dim
    W_Q = layer.q_proj.weight.T
    W_A = layer.mixer if isinstance(layer, swap.SuperAttention) else torch.eye(n)[None].to(x)
    heads = []
    for h in range(layer.heads):
        own = slice(h * width, (h + 1) * width)
        keys = x[:, own] if layer.own_keys else x @ layer.k_proj.weight.T[:, own]
        mix = W_A[h if len(W_A) > 1 else 0, :n, :n]
        mix = mix.tril() if layer.causal else mix
        values, rows = mix @ x[:, own], []
        for i in range(n):
            last = i + 1 if layer.causal else n
            rows.append(torch.softmax(keys[:last] @ (x[i] @ W_Q[:, own]) / math.sqrt(width), 0) @ values[:last])
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1) @ layer.o_proj.weight.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_loops(kind, causal):
    torch.manual_seed(0)
    own = {"share": causal, "init": "xavier"} if kind is swap.SuperAttention else {}
    layer, x = kind(DIM, HEADS, causal=causal, **own).double(), tokens(1, 7)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], by_loops(layer, x[0]), rtol=0, atol=1e-12)


def test_super_with_the_identity_is_efficient():
    efficient, mixing = (kind(DIM, HEADS).double() for kind in KINDS[1:])
    mixing.load_state_dict(efficient.state_dict() | {"mixer": torch.eye(64).double()[None]})
    torch.testing.assert_close(mixing(tokens()), efficient(tokens()), rtol=0, atol=1e-12)


def test_one_head_loses_nothing():
    torch.manual_seed(0)
    plain, slim = swap.Attention(DIM, 1).double(), swap.EfficientAttention(DIM, 1).double()
    with torch.no_grad():
        slim.q_proj.weight.copy_((plain.q_proj.weight.T @ plain.k_proj.weight).T)
        slim.o_proj.weight.copy_((plain.v_proj.weight.T @ plain.o_proj.weight.T).T)
        torch.testing.assert_close(slim(tokens()), plain(tokens()), rtol=0, atol=1e-12)


def gpt2(heads: int) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=heads, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # weights and biases that count
    return model


@pytest.mark.parametrize("mechanism", ["optimised_attention", "efficient_attention"])
def test_a_trained_layer_of_one_head_is_equal_at_step_0(mechanism):
    ids = torch.arange(9)[None]
    with torch.no_grad():
        for heads, equal in ((1, True), (4, False)):
            model = gpt2(heads)
            plain = model(ids).logits
            with swap.convert(model, mechanism):
                assert torch.allclose(model(ids).logits, plain, rtol=0, atol=1e-9) == equal
            assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("mechanism", [kind.key() for kind in KINDS])
def test_a_converted_llama_decodes_as_it_reads(mechanism):
    model, ids = llama(64), torch.arange(10)[None]
    with swap.convert(model, mechanism), torch.no_grad():
        whole = model(ids).logits
        start = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=start.past_key_values)
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], 1), whole, rtol=0, atol=1e-5)


def test_efficient_keeps_one_tensor():
    layer, cache = swap.EfficientAttention(DIM, HEADS, causal=True).double(), swap.Cache()
    layer(tokens(), cache=cache)
    assert list(cache.of(layer).grown) == ["v"]


def test_the_map_that_acts_on_the_input():
    torch.manual_seed(0)
    layer, x = swap.SuperAttention(DIM, HEADS, causal=True, share=False).double(), tokens(1)
    with torch.no_grad(), attend(layer, [Map()]) as run:
        y = layer(x)
    weights = torch.as_tensor(run.tree["text"].dataset["map"].values).reshape(HEADS, LENGTH, LENGTH).double()
    channels = x[0].unflatten(-1, (HEADS, -1)).transpose(0, 1)
    z = (layer.effective(weights) @ channels).transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.o_proj(z), y[0], rtol=0, atol=1e-5)


def test_padding_is_nothing_to_super_attention():
    layer, x = swap.SuperAttention(DIM, HEADS).double(), tokens()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, 9:] = False
    torch.testing.assert_close(layer(x, mask=mask)[:, :9], layer(x[:, :9]), rtol=0, atol=1e-12)


def test_costs_are_the_formulas():
    plain, optimised, efficient = (kind(DIM, HEADS).flops(20) for kind in (swap.Attention, *KINDS[:2]))
    assert plain - optimised == optimised - efficient == 2 * 20 * DIM**2


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"EfficientAttention: every head has its own.*kv_heads=2"):
        swap.EfficientAttention(DIM, HEADS, 2)
    with pytest.raises(HeadwiseError, match=r"max_len of at least 1.*got 0"):
        swap.SuperAttention(DIM, HEADS, max_len=0)
    with pytest.raises(HeadwiseError, match=r"mixes up to max_len=4 tokens; got 12"):
        swap.SuperAttention(DIM, HEADS, max_len=4).double()(tokens())
    with pytest.raises(HeadwiseError, match=r"give a mask as bools"):
        swap.SuperAttention(DIM, HEADS).double()(tokens(), mask=Mask(added=torch.zeros(1, 1, 1, LENGTH)))
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    with pytest.raises(HeadwiseError, match=r"has its output matrix outside"):
        swap.convert(transformers.BertModel(config), "optimised_attention")
