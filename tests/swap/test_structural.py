"""Attention as structural inference: against all structures there are, priors, hops, windows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from headwise import swap
from headwise.attention import Map, attend
from headwise.attention.call import AttentionCall
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens


def seen_map(layer: swap.Attention, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), attend(layer, [Map()]) as run:
        layer(x)
    return torch.as_tensor(run.tree["text"].dataset["map"].values).reshape(HEADS, x.shape[1], x.shape[1])


def log_psi(layer: swap.Attention, x: torch.Tensor) -> torch.Tensor:
    q, k = (p(x[0]).view(x.shape[1], HEADS, -1).transpose(0, 1) for p in (layer.q_proj, layer.k_proj))
    return (q @ k.mT / math.sqrt(q.shape[-1])).detach()


@pytest.mark.parametrize("edge", ["categorical", "bernoulli"])
def test_marginals_over_all_structures(edge):
    """4 nodes: every set of links is enumerated, with its prior times the product of its potentials."""
    torch.manual_seed(0)
    prior = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().double()
    layer = swap.StructuralAttention(DIM, HEADS, edge=edge, prior=lambda i, j: prior.expand(len(i), -1)).double()
    x = tokens(1, 4)
    psi = log_psi(layer, x)[2].exp() * prior.exp()
    total, marginal = 0.0, torch.zeros(4, 4, dtype=torch.float64)
    if edge == "categorical":
        for links in itertools.product(range(4), repeat=4):
            p = math.prod(psi[i, j].item() for i, j in enumerate(links))
            total += p
            for i, j in enumerate(links):
                marginal[i, j] += p
    else:  # 2^16 sets of links
        bits = (torch.arange(2**16)[:, None] >> torch.arange(16)) & 1
        p = torch.where(bits > 0, psi.flatten(), 1.0).prod(-1)
        total, marginal = p.sum(), (p[:, None] * bits).sum(0).view(4, 4)
    torch.testing.assert_close(seen_map(layer, x)[2].double(), marginal / total, rtol=0, atol=1e-6)


def test_a_prior_is_a_bias():
    torch.manual_seed(0)
    layer = swap.StructuralAttention(DIM, HEADS, causal=True, prior="alibi", position=swap.Rope()).double()
    geometric = swap.StructuralAttention(DIM, HEADS, causal=True, prior=lambda i, j: (i - j) * math.log(0.5)).double()
    plain = swap.Attention(DIM, HEADS, causal=True).double()
    geometric.load_state_dict(plain.state_dict())
    x = tokens(1, 6)
    given = torch.softmax(log_psi(plain, x) + torch.ones(6, 6).tril().log(), -1)
    given = given * 0.5 ** (torch.arange(6)[:, None] - torch.arange(6)).clamp(min=0)
    torch.testing.assert_close(seen_map(geometric, x).double(), given / given.sum(-1, keepdim=True), rtol=0, atol=1e-6)
    assert layer.position.bias(2, torch.arange(3), torch.arange(3))[0, 1, 2, 0] == -(2**-8) * 2


def test_mixture_responsibilities():
    """Categorical attention over keys of one length, with q = z and k = x, is a Gaussian mixture's posterior."""
    z, x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = z / z.norm(dim=-1, keepdim=True)
    posterior = torch.softmax(-((x[:, None] - z) ** 2).sum(-1) / 2, -1)  # of the components z for each x
    torch.testing.assert_close(torch.softmax(x @ z.T, -1), posterior)


def test_hard_links():
    torch.manual_seed(0)
    x = tokens(1, 6)
    layer = swap.StructuralAttention(DIM, HEADS, causal=True, hard=True).double().eval()
    scores = log_psi(layer, x).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf)
    assert torch.equal(seen_map(layer, x).double(), torch.eye(6).double()[scores.argmax(-1)])
    each = swap.StructuralAttention(DIM, HEADS, causal=True, hard=True, edge="bernoulli").double().eval()
    each.load_state_dict(layer.state_dict())
    assert torch.equal(seen_map(each, x).double(), (scores > 0).double())
    s = torch.tensor([[[[0.0, 1.0, -math.inf]]]]).expand(1, 1, 20_000, 3)
    for edge, posterior in (("categorical", torch.softmax(s, -1)), ("bernoulli", torch.sigmoid(s))):
        drawn = swap.Hard(edge).train()(s, s > -math.inf)
        torch.testing.assert_close(drawn.mean(2), posterior[:, :, 0], rtol=0, atol=0.02)
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
    part = torch.tensor([[[[0.3, 1.0]]]], requires_grad=True)
    both = torch.ones_like(part, dtype=torch.bool)
    weight = torch.tensor([1.0, 3.0])
    (soft,) = torch.autograd.grad((torch.softmax(part, -1) * weight).sum(), part)
    (hard,) = torch.autograd.grad((swap.Hard()(part, both) * weight).sum(), part)
    torch.testing.assert_close(hard, soft)


def test_two_hops_equal_two_matrices():
    torch.manual_seed(0)
    layer, x = swap.MultiHopAttention(DIM, HEADS, 2, causal=True).double(), tokens(1, 6)
    q = layer.q_proj(x[0]).view(6, HEADS, 8).transpose(0, 1)
    k, v, far = (
        p(x[0]).view(6, 2, 8).transpose(0, 1).repeat_interleave(2, 0)
        for p in (layer.k_proj, layer.v_proj, layer.far_proj)
    )
    a = torch.softmax(q @ k.mT / math.sqrt(8) + torch.ones(6, 6).tril().log(), -1)
    z = a @ v + a @ a @ far
    torch.testing.assert_close(layer(x)[0], layer.o_proj(z.transpose(0, 1).flatten(1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["structural_attention", "multi_hop_attention"])
def test_equal_at_the_start(name):
    model, ids = llama(64), torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        plain = model(ids).logits
        with swap.convert(model, name):
            torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-6)
            generated = model.generate(ids, max_new_tokens=4, do_sample=False)
            assert torch.equal(generated, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


def expanded(tol: float, spread: float = 1.0, length: int = 64) -> tuple[torch.Tensor, ...]:
    part = swap.GeometricBeta(tol=tol)
    q, k = spread * torch.randn(2, 1, 2, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    call = AttentionCall(q, k, k, 8**-0.5, Mask(right=0))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    _, slope, window = part.expand(q, k, call)
    return torch.softmax(part(q, k, call).masked_fill(~causal, -math.inf), -1), slope, window


def test_the_geometric_prior_is_at_its_fixed_point():
    part = swap.GeometricBeta(a0=2.0, b0=3.0, iterations=200)
    q, k = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, slope, _ = part.expand(q, k, AttentionCall(q, k, k, 8**-0.5, Mask(right=0)))
    gap = (torch.arange(8)[:, None] - torch.arange(8)).double()
    for i in range(8):
        s = q[0, 0, i] @ k[0, 0, : i + 1].T / math.sqrt(8) + slope[0, 0, i] * gap[i, : i + 1]
        a = 2.0 + torch.softmax(s, -1) @ gap[i, : i + 1]
        wanted = torch.digamma(a) - torch.digamma(a + 4.0)
        torch.testing.assert_close(slope[0, 0, i, 0], wanted, rtol=0, atol=1e-9)


def test_a_window_leaves_out_no_more_than_its_tolerance():
    whole, _, none = expanded(0.0)
    assert none is None
    previous = 0.0
    for tol in (0.2, 1e-2, 1e-4):
        cut, _, window = expanded(tol)
        assert ((cut > 0).sum(-1) <= window[..., 0]).all()
        assert (cut - whole).abs().sum(-1).max() < 4 * tol
        assert window.double().mean() > previous
        previous = window.double().mean()
    assert expanded(0.2, 0.1)[2].double().mean() < 40


def test_bad_settings_are_refused():
    with pytest.raises(HeadwiseError, match="prior is uniform, alibi, geometric_beta or a function; got 'flat'"):
        swap.StructuralAttention(DIM, HEADS, prior="flat")
    with pytest.raises(HeadwiseError, match="edge is categorical or bernoulli; got 'soft'"):
        swap.StructuralAttention(DIM, HEADS, edge="soft")
    with pytest.raises(HeadwiseError, match="edge must be categorical"):
        swap.ExpandingAttention(DIM, HEADS, edge="bernoulli")
    with pytest.raises(HeadwiseError, match=r"wanted a0, b0 > 0.*got a0=0"):
        swap.ExpandingAttention(DIM, HEADS, a0=0)
    with pytest.raises(HeadwiseError, match="log_prior is a position or a function"):
        swap.Prior("alibi")
    with pytest.raises(HeadwiseError, match="leave out context"):
        swap.MultiHopAttention(DIM, HEADS)(tokens().float(), context=tokens().float())
