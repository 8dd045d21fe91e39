"""Dual attention: against loops over pairs, its limit cases, symbols, and conversion."""

from __future__ import annotations

import math

import pytest
import torch

from headwise import swap
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, LENGTH, tokens


class Same(swap.Symbols):
    """Symbols that are the tokens."""

    def forward(self, x: torch.Tensor, places) -> torch.Tensor:
        return x


def relational_heads(layer: swap.DualAttention, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the relational heads of one causal sequence without rotation, pair by pair."""
    n, width, found = len(x), layer.head_dim, []
    group = layer.heads // layer.kv_heads
    if layer.symbols.relative:
        r = layer.symbols.reach
        symbol = lambda i, j: layer.symbols.table[min(max(j - i, -r), r) + r]  # noqa: E731
    else:
        rows = layer.symbols(x[None], swap.parts.Places(torch.arange(n)[None]))[0]
        symbol = lambda i, j: rows[j]  # noqa: E731
    relations = layer.relation_map(x[None])[0]
    for number, h in enumerate(range(layer.sensory, layer.heads)):
        W_q = layer.q_proj.weight.view(layer.heads, width, -1)[h]
        W_k = layer.k_proj.weight.view(layer.kv_heads, width, -1)[h // group]
        W_s = layer.s_proj.weight.view(-1, width, DIM)[number // group]
        out = torch.zeros(n, width, dtype=x.dtype)
        for i in range(n):
            scores = torch.stack([(W_q @ x[i]) @ (W_k @ x[j]) / math.sqrt(width) for j in range(i + 1)])
            for j, a in enumerate(scores.softmax(0)):
                out[i] += a * (layer.r_out[number] @ relations[i, j] + W_s @ symbol(i, j))
        found.append(out)
    return found


@pytest.mark.parametrize(
    "own,kv_heads",
    [
        ({}, None),
        ({"relations": 4, "symmetric": True, "symbols": "position"}, 2),
        ({"act": "tanh", "symbols": swap.SymbolicAttention(DIM, 2, 7)}, 2),
        ({"relational": 4, "symbols": swap.RelativeSymbols(DIM, 2)}, None),
    ],
)
def test_equals_pairs(own, kv_heads):
    torch.manual_seed(0)
    layer = swap.DualAttention(DIM, HEADS, kv_heads, causal=True, **own).double()
    x = tokens(1, 6)
    with torch.no_grad():
        wanted = torch.cat(relational_heads(layer, x[0]), -1) @ layer.so_proj.weight.T
        got = layer(x)[0, :, layer.sensory * layer.head_dim :]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_relations_are_products():
    torch.manual_seed(0)
    layer, x = swap.DualAttention(DIM, HEADS, relations=1, act="relu").double(), tokens(1, 5)
    q, k = layer.rq_proj(x[0]), layer.rk_proj(x[0])  # one relation as wide as both heads
    torch.testing.assert_close(layer.relation_map(x)[0, ..., 0], torch.relu(q @ k.T / 4))


def test_without_relational_heads_it_is_attention():
    dual, plain = (
        swap.DualAttention(DIM, HEADS, 2, relational=0, causal=True),
        swap.Attention(DIM, HEADS, 2, causal=True),
    )
    dual.load_state_dict(plain.state_dict())
    x = tokens().float()
    torch.testing.assert_close(dual(x), plain(x), rtol=0, atol=1e-6)
    assert dual.flops(30) == plain.flops(30)


def test_symbols_that_are_tokens_and_no_relations_make_it_attention():
    torch.manual_seed(0)
    dual = swap.DualAttention(DIM, HEADS, relational=HEADS, symbols=Same()).double()
    plain = swap.Attention(DIM, HEADS).double()
    with torch.no_grad():
        dual.r_out.zero_()
        for mine, its in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "s_proj"), ("o_proj", "so_proj")):
            getattr(plain, mine).weight.copy_(getattr(dual, its).weight)
    torch.testing.assert_close(dual(tokens()), plain(tokens()), rtol=0, atol=1e-12)


def test_symmetric_relations_are_symmetric():
    layer = swap.DualAttention(DIM, HEADS, symmetric=True).double()
    found = layer.relation_map(tokens())
    torch.testing.assert_close(found, found.transpose(1, 2))
    alike = layer.relation_map(tokens(1, 1).expand(1, 4, -1))
    torch.testing.assert_close(alike, alike[:, :1, :1].expand_as(alike))


def test_positions_do_not_turn_relations():
    torch.manual_seed(0)
    plain = swap.DualAttention(DIM, HEADS, symbols=Same()).double()
    turned = swap.DualAttention(DIM, HEADS, symbols=Same(), position=swap.Rope()).double()
    turned.load_state_dict(plain.state_dict())
    x = tokens()
    torch.testing.assert_close(turned.relation_map(x), plain.relation_map(x))
    assert not torch.allclose(turned(x), plain(x))


def test_symbols_come_from_the_library():
    torch.manual_seed(0)
    retriever, x = swap.SymbolicAttention(DIM, 1, 5).double(), tokens(1, 3)[0]
    weights = torch.softmax(retriever.q_proj(x) @ retriever.templates.T / math.sqrt(DIM), -1)
    places = swap.parts.Places(torch.arange(3)[None])
    torch.testing.assert_close(retriever(x[None], places)[0], weights @ retriever.library)


def test_one_library_for_all_layers():
    library = swap.SymbolicAttention(DIM, 4, 9)
    layers = torch.nn.ModuleList(swap.DualAttention(DIM, HEADS, symbols=library) for _ in range(2))
    assert sum(p is library.library for p in layers.parameters()) == 1


def test_shared_queries_and_keys():
    torch.manual_seed(0)
    layer = swap.DualAttention(DIM, HEADS, share_qk=True, relations=0, symbols=Same()).double()
    with torch.no_grad():
        layer.s_proj.weight.copy_(layer.sensory_v.weight)
        layer.so_proj.weight.copy_(layer.sensory_out.weight)
        one, two = layer(tokens()).chunk(2, -1)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_a_converted_model():
    model, ids = llama(64), torch.arange(10)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with swap.convert(model, "dual_attention", relational=0):
            torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-6)
        with swap.convert(model, "dual_attention", relational=2) as conversion:
            whole = model(ids).logits
            start = model(ids[:, :7], use_cache=True)
            rest = model(ids[:, 7:], past_key_values=start.past_key_values).logits
            torch.testing.assert_close(torch.cat([start.logits, rest], 1), whole, rtol=0, atol=1e-5)
            layer = conversion.mechanisms["model.layers.0.self_attn"]
        own = model.model.layers[0].self_attn
    torch.testing.assert_close(layer.sensory_v.weight, own.v_proj.weight[:8])
    torch.testing.assert_close(layer.so_proj.weight, own.o_proj.weight[16:, 16:])


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"relations must divide head_dim \* relational = 16; got 3"):
        swap.DualAttention(DIM, HEADS, relations=3)
    with pytest.raises(HeadwiseError, match=r"relational must be 0 to 4, a multiple of 2"):
        swap.DualAttention(DIM, HEADS, 2, relational=1)
    with pytest.raises(HeadwiseError, match=r"relational must be 0 to 4, a multiple of 4.*got None"):
        swap.DualAttention(DIM, HEADS, 1)
    with pytest.raises(HeadwiseError, match=r"share_qk wants equally many heads of both kinds; got 3, 1"):
        swap.DualAttention(DIM, HEADS, relational=1, share_qk=True)
    with pytest.raises(HeadwiseError, match=r"act is one of identity.*got 'cube'"):
        swap.DualAttention(DIM, HEADS, act="cube")
    with pytest.raises(HeadwiseError, match=r"side by side must be dim wide; got 4 of 16, dim=32"):
        swap.DualAttention(DIM, HEADS, head_dim=16)
    with pytest.raises(HeadwiseError, match=r"compares tokens of one sequence"):
        swap.DualAttention(DIM, HEADS).double()(tokens(), context=tokens())
    with pytest.raises(HeadwiseError, match=r"vectors for 4 places; got 12 tokens"):
        swap.DualAttention(DIM, HEADS, symbols=swap.PositionSymbols(DIM, 4)).double()(tokens())
    with pytest.raises(HeadwiseError, match=r"dim must be a multiple of heads"):
        swap.SymbolicAttention(DIM, 5)
    with pytest.raises(HeadwiseError, match=r"has relations=0"):
        swap.DualAttention(DIM, HEADS, relations=0).double().relation_map(tokens(1, LENGTH))
