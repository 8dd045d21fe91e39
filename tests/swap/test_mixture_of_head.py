"""Mixture of heads: the gates, their balance, and conversion without new parameters."""

from __future__ import annotations

import copy

import pytest
import torch

from headwise import swap
from headwise.errors import HeadwiseError
from headwise.study.hosts import Decoder
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, out


def make(heads: int = HEADS, **own) -> swap.MixtureOfHeadAttention:
    torch.manual_seed(0)
    return swap.MixtureOfHeadAttention(DIM, heads, causal=True, **own).double()


def plain_of(layer: swap.MixtureOfHeadAttention) -> swap.Attention:
    plain = swap.Attention(DIM, layer.heads, causal=True).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    return plain


def test_even_gates_are_multi_head_attention():
    layer = make(shared=1, topk=3)
    assert layer.share is None  # one shared head has the gate 1 among the shared
    layer = make(shared=2, topk=2)
    with torch.no_grad():
        for router in (layer.pick, layer.share, layer.balance):
            router.weight.zero_()
    torch.testing.assert_close(layer(tokens()), plain_of(layer)(tokens()), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.gates, torch.ones_like(layer.gates), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared,topk", [(2, 1), (1, 2), (0, 2), (4, 0), (5, 2)])
def test_gates_by_hand(shared: int, topk: int):
    layer, x = make(8, shared=shared, topk=topk) if shared == 5 else make(shared=shared, topk=topk), tokens()
    layer(x)
    for b, t in ((0, 0), (1, 5)):
        one = x[b, t]
        s = [1.0] * shared if shared <= 1 else (shared * (layer.share.weight @ one).softmax(0)).tolist()
        gates = s
        if topk:
            p = (layer.pick.weight @ one).softmax(0).tolist()
            best = sorted(range(len(p)), key=lambda n: -p[n])[:topk]
            r = [topk * p[n] / sum(p[m] for m in best) if n in best else 0.0 for n in range(len(p))]
            a1, a2 = (2 * (layer.balance.weight @ one).softmax(0)).tolist() if shared else (1.0, 1.0)
            gates = [a1 * g for g in s] + [a2 * g for g in r]
        torch.testing.assert_close(layer.gates[b, t], torch.tensor(gates, dtype=torch.float64), rtol=0, atol=1e-12)
        z = plain_of(layer)
        parts = z.attend(*z.project(x, x, z.places(x, None, None)), z.visible(None, 2), z.places(x, None, None))
        y = sum(
            gates[h] * parts[b, h, t] @ layer.o_proj.weight.view(DIM, layer.heads, -1)[:, h].T
            for h in range(layer.heads)
        )
        torch.testing.assert_close(layer(x)[b, t], y, rtol=0, atol=1e-12)


def test_balance_is_the_number_picked_where_usage_is_even():
    layer = make(8, shared=2, topk=3, balance_weight=1.0).train()
    with torch.no_grad():
        layer.pick.weight.zero_()
    layer(tokens())
    assert layer.aux_loss.item() == pytest.approx(3.0, abs=1e-12)
    layer = make(8, shared=2, topk=3, balance_weight=0.5).train()
    x = tokens()
    layer(x)
    p = (x @ layer.pick.weight.T).softmax(-1).flatten(0, 1)
    f = torch.zeros(6, dtype=torch.float64)
    for row in p:
        f[row.topk(3).indices] += 1 / len(p)
    assert layer.aux_loss.item() == pytest.approx(0.5 * 6 * (p.mean(0) * f).sum().item(), abs=1e-12)
    layer.eval()(x)
    assert layer.aux_loss is None


def test_the_balance_loss_reaches_the_router_through_the_host():
    torch.manual_seed(0)
    model = Decoder(lambda _: swap.MixtureOfHeadAttention(DIM, HEADS, causal=True, balance_weight=1.0), 9, DIM, 2)
    ids = torch.randint(9, (2, 7))
    result = model.train()(ids, labels=ids)
    assert result.loss.item() == pytest.approx(
        result.nll.item() + sum(b.mechanism.aux_loss.item() for b in model.blocks)
    )
    assert all(b.mechanism.pick.weight.grad is None for b in model.blocks)
    result.loss.backward()
    assert all(b.mechanism.pick.weight.grad.abs().sum() > 0 for b in model.blocks)
    copied = copy.deepcopy(model.eval())  # which a graph kept would not allow
    assert torch.equal(copied(ids).logits, model(ids).logits)


def test_norms_of_queries_pick_heads():
    layer, x = make(8, shared=3, topk=2, router="qnorm", position=swap.Rope()), tokens()
    layer(x)
    norms = layer.q_proj(x).unflatten(-1, (8, 4)).norm(dim=-1)
    for b, t in ((0, 0), (1, 6)):
        best = (norms[b, t, 3:] / norms[b, t, 3:].std()).topk(2).indices.tolist()
        assert layer.gates[b, t].tolist() == [1.0] * 3 + [float(n in best) for n in range(5)]
    assert layer.active_share == 5 / 8
    assert layer.parameter_count == plain_of(layer).parameter_count


def test_the_hard_choice_has_the_gradient_of_the_soft_one():
    layer = make(8, shared=3, topk=2, router="qnorm")
    q = torch.randn(1, 8, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 2, 8, dtype=torch.float64)
    (hard,) = torch.autograd.grad((layer.norm_gates(q) * weight).sum(), q)
    norms = q[:, 3:].norm(dim=-1).mT
    (soft,) = torch.autograd.grad(((norms / norms.std(-1, keepdim=True)).softmax(-1) * weight[..., 3:]).sum(), q)
    torch.testing.assert_close(hard, soft, rtol=0, atol=1e-12)


def test_queries_of_equal_norm_pick_something():
    layer = make(4, shared=2, topk=1, router="qnorm")
    assert layer.norm_gates(torch.ones(1, 4, 3, 8)).sum(-1).tolist() == [[3.0] * 3]
    layer = make(4, shared=3, topk=1, router="qnorm")
    assert layer.norm_gates(torch.randn(1, 4, 3, 8)).tolist() == [[[1.0] * 4] * 3]


def test_in_a_trained_model():
    model = llama(64)
    plain = out(model)
    with swap.convert(model, "mixture_of_head_attention", shared=2, topk=2):
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)
    with swap.convert(model, "mixture_of_head_attention") as conversion:
        layer = next(iter(conversion.mechanisms.values()))
        assert (layer.router, layer.shared, layer.topk) == ("qnorm", 2, 1)
        assert not torch.allclose(out(model), plain)
        given = dict(max_new_tokens=5, do_sample=False)
        assert torch.equal(model.generate(IDS, **given), model.generate(IDS, use_cache=False, **given))


def test_bad_input():
    for own in ({"shared": 4, "topk": 1}, {"shared": 2, "topk": 3}, {"shared": 2, "topk": 0}, {"shared": 5}):
        with pytest.raises(HeadwiseError, match=r"shared, topk: wanted at most 4 shared heads"):
            make(**own)
    with pytest.raises(HeadwiseError, match=r"router: wanted learned or qnorm; got 'hash'"):
        make(router="hash")
