"""Scores by a network over pairs: the printed form, hand-set weights, tiles, limits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headwise import swap
from headwise.attention.call import AttentionCall
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, out


def call_of(q: torch.Tensor, k: torch.Tensor) -> AttentionCall:
    return AttentionCall(q, k, k, 1.0)


def drawn(heads: int, rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, heads, rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def printed(score: swap.PairMLP, net: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """One pair, the network as the paper prints it, on the concatenated pair."""
    q, k = (m.weight[net] @ x + m.bias[net] for m, x in ((score.q_shrink, q), (score.k_shrink, k)))
    w1 = torch.cat([score.first_q.weight[net], score.first_k.weight[net]], 1)
    hidden = (w1 @ torch.cat([q, k]) + score.first_q.bias[net]).relu()
    hidden = (score.second.weight[net] @ hidden + score.second.bias[net]).relu()
    return score.last.weight[net, 0] @ hidden + score.last.bias[net, 0]


@pytest.mark.parametrize("heads", [None, 3])
def test_the_split_form_equals_the_network_on_pairs(heads: int | None):
    torch.manual_seed(0)
    score = swap.PairMLP(8, 4, (6, 5), heads).double()
    q, k = drawn(3, 4, 8), drawn(3, 5, 8, 1)
    s = score(q, k, call_of(q, k))
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in s.shape)):
        wanted = printed(score, int(h) if heads else 0, q[b, h, i], k[b, h, j])
        assert s[b, h, i, j].item() == pytest.approx(wanted.item(), abs=1e-12)


def test_sizes_by_default_and_bad_ones():
    score = swap.PairMLP(64)
    assert (score.q_shrink.out, score.first_q.out, score.second.out) == (2, 2, 1)
    assert swap.PairMLP(256).q_shrink.out == 8
    with pytest.raises(HeadwiseError, match=r"PairMLP: sizes are positive; got dim=8, proj_dim=0"):
        swap.PairMLP(8, 0)
    with pytest.raises(HeadwiseError, match=r"act is one of relu, leaky_relu, gelu; got 'tanh'"):
        swap.NeuralAttention(DIM, HEADS, act="tanh")
    with pytest.raises(HeadwiseError, match=r"dim 30 is no multiple of 4 heads"):
        swap.NeuralAttention(30, 4)


@pytest.mark.parametrize("tile", [1, 5, 7])
def test_tiles_change_neither_scores_nor_gradients(tile: int):
    found = []
    for size in (128, tile):
        torch.manual_seed(0)
        layer = swap.NeuralAttention(DIM, HEADS, proj_dim=4, causal=True, tile=size).double()
        x = tokens().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        with torch.no_grad():
            found.append([y.detach(), layer(x), x.grad, layer.score.second.weight.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_last_layer_of_zeros_is_uniform_attention():
    torch.manual_seed(0)
    layer, x = swap.NeuralAttention(DIM, HEADS, causal=True).double(), tokens()
    nn.init.zeros_(layer.score.last.weight)
    mean = layer.v_proj(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
    torch.testing.assert_close(layer(x), layer.o_proj(mean), rtol=0, atol=1e-12)


def test_hand_set_weights_score_a_distance():
    """`s = relu(1 - 10 |q - k|)`, which no product of a query and a key is."""
    score = swap.PairMLP(1, 1, (2, 1)).double()
    settings = {
        "q_shrink": ([[[1.0]]], [[0.0]]), "k_shrink": ([[[1.0]]], [[0.0]]),
        "first_q": ([[[1.0], [-1.0]]], [[0.0, 0.0]]), "first_k": ([[[-1.0], [1.0]]], None),
        "second": ([[[-10.0, -10.0]]], [[1.0]]), "last": ([[[1.0]]], [[0.0]]),
    }  # fmt: skip
    with torch.no_grad():
        for name, (weight, bias) in settings.items():
            getattr(score, name).weight.copy_(torch.tensor(weight))
            if bias is not None:
                getattr(score, name).bias.copy_(torch.tensor(bias))
    q, k = drawn(2, 30, 1), drawn(2, 40, 1, 1)
    wanted = (1 - 10 * (q - k.mT).abs()).relu()
    torch.testing.assert_close(score(q, k, call_of(q, k)), wanted, rtol=0, atol=1e-12)
    assert score.dead_share(q, k, call_of(q, k)) == pytest.approx((wanted == 0).double().mean().item())


def test_heads_of_a_selection_keep_their_networks():
    torch.manual_seed(0)
    score = swap.PairMLP(8, 4, heads=3).double()
    q = drawn(3, 4, 8)
    whole = score(q, q, call_of(q, q))
    part = call_of(q, q).select(heads=[2, 0])
    torch.testing.assert_close(score(part.q, part.k, part), whole[:, [2, 0]], rtol=0, atol=0)


def test_half_precision():
    torch.manual_seed(0)
    layer = swap.NeuralAttention(DIM, HEADS, causal=True)
    x = tokens().float()
    wanted = layer(x)
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=3e-2)


def test_in_the_first_layer_of_a_trained_model():
    model = llama(64)
    plain = out(model)
    with swap.convert(model, "neural_attention", layers=[0]) as conversion:
        (layer,) = conversion.mechanisms.values()
        assert layer.score.q_shrink.out == 2
        out(model, labels=IDS)
        model(IDS, labels=IDS).loss.backward()
        assert layer.score.first_q.weight.grad is not None
        given = dict(max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(IDS, **given), model.generate(IDS, use_cache=False, **given))
    assert torch.equal(out(model), plain)
