"""Softmax taken apart: against the formulas, and its series as a recurrent network."""

from __future__ import annotations

import math

import pytest
import torch

from headwise import swap
from headwise.errors import HeadwiseError
from headwise.swap.parts.numerators import powers, taylor
from tests.models.tiny import llama
from tests.swap.cases import CASES, DIM, HEADS, LENGTH, make, tokens


def scores(spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    seen = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    s = torch.randn(1, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * spread
    return s.masked_fill(~seen, -math.inf), seen


def test_every_divisor():
    s, seen = scores(3.0)
    e, total, count = s.exp(), s.exp().sum(-1, keepdim=True), seen.sum(-1, keepdim=True)
    cut = s.clamp(max=5.0).exp()
    wanted = {"sum": e / total, "detach": e / total, "clamp": e / total.clamp(min=1), "count": cut / count, "none": cut}
    for divide, value in wanted.items():
        torch.testing.assert_close(swap.Numerator("exp", divide)(s, seen), value)
    few = s - 8  # sums below 1
    torch.testing.assert_close(
        swap.Numerator("exp", "clamp")(few, seen), few.exp() / few.exp().sum(-1, True).clamp(min=1)
    )
    large = s + 800
    assert all(swap.Numerator("exp", d)(large, seen).isfinite().all() for d in wanted)
    torch.testing.assert_close(swap.Numerator("exp", "clamp")(large, seen), wanted["sum"])


def test_a_detached_divisor_has_no_gradient():
    s, seen = scores()
    s = s.masked_fill(~seen, 0.0).requires_grad_()
    (grad,) = torch.autograd.grad(swap.Numerator("exp", "detach")(s.masked_fill(~seen, -math.inf), seen).sum(), s)
    torch.testing.assert_close(grad, torch.softmax(s.masked_fill(~seen, -math.inf), -1))


def test_the_series_becomes_softmax():
    s, seen = scores(3.0)
    assert s[seen].abs().max() < 8
    torch.testing.assert_close(swap.Numerator("taylor", "sum", 60)(s, seen), torch.softmax(s, -1), rtol=0, atol=1e-6)
    first = (1 + s.masked_fill(~seen, 0)).masked_fill(~seen, 0)
    torch.testing.assert_close(swap.Numerator("taylor", "sum", 1)(s, seen), first / first.sum(-1, keepdim=True))
    x, y = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for order in range(4):
        explicit = sum((x @ y.T) ** n / math.factorial(n) for n in range(order + 1))
        torch.testing.assert_close(taylor(x @ y.T, order), explicit)
        torch.testing.assert_close(powers(x, order) @ powers(y, order).T, explicit)


def test_l2_is_the_direction_of_softmax():
    torch.manual_seed(0)
    layer = swap.SoftmaxAblation(DIM, HEADS, causal=True).double()
    plain = swap.Attention(DIM, HEADS, causal=True, position=swap.Rope()).double()
    plain.load_state_dict(layer.state_dict())
    plain.o_proj = layer.o_proj = torch.nn.Identity()
    x = tokens()
    heads = plain(x).unflatten(-1, (HEADS, -1))
    torch.testing.assert_close(layer(x).unflatten(-1, (HEADS, -1)), heads / heads.norm(dim=-1, keepdim=True))


def test_gates_equal_a_loop():
    torch.manual_seed(0)
    layer = swap.SoftmaxAblation(
        DIM, HEADS, 2, causal=True, normaliser="count", in_gate=True, out_gate=True, position=swap.Position()
    ).double()
    x = tokens(1, 5)
    q, k, v = (p(x[0]).view(5, -1, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    into, out = torch.sigmoid(layer.in_gate(x[0])), torch.sigmoid(layer.out_gate(x[0]))
    z = torch.zeros(5, HEADS, 8, dtype=torch.float64)
    for i in range(5):
        for h in range(HEADS):
            for j in range(i + 1):
                z[i, h] += torch.exp(q[i, h] @ k[j, h // 2] / math.sqrt(8)) * into[j, h // 2] * v[j, h // 2]
            z[i, h] *= out[i, h] / (i + 1)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(z.flatten(1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES["taylor_rnn"])
def test_a_state_keeps_no_padding(case):
    layer, x = make("taylor_rnn", case, causal=True), tokens()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :3] = False
    pairs = mask[:, None, None].expand(2, 1, LENGTH, LENGTH).tril()
    with torch.no_grad():
        whole = layer(x, mask=mask)
        for given in (mask, pairs):
            cache = swap.Cache()
            first = layer(x[:, :7], mask=given[..., :7, :7] if given.ndim == 4 else given[:, :7], cache=cache)
            rest = [
                layer(x[:, n : n + 1], mask=given[..., n : n + 1, : n + 1] if given.ndim == 4 else given, cache=cache)
                for n in range(7, LENGTH)
            ]
            out = torch.cat([first, *rest], 1)
            torch.testing.assert_close(out[mask], whole[mask], rtol=0, atol=1e-9)


def test_the_state_does_not_grow():
    layer, cache = make("taylor_rnn", CASES["taylor_rnn"][0], causal=True), swap.Cache()
    sizes = []
    for _ in range(2):
        with torch.no_grad():
            layer(tokens(1, 70), cache=cache)
        entries = cache.of(layer)
        sizes.append(sum(t.numel() for t in (*entries.states.values(), *entries.grown.values())))
    assert sizes[0] == sizes[1] == 2 * (1 + 8 + 64) * 9 + 1


def test_a_converted_model_generates_from_the_state():
    model, ids = llama(64), torch.tensor([[1, 5, 6, 7], [3, 3, 1, 9]])
    given = dict(attention_mask=(ids != 3).long(), max_new_tokens=6, do_sample=False)
    with swap.convert(model, "softmax_ablation", normaliser="sum"):
        plain = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, **given), plain)
    with swap.convert(model, "taylor_rnn"):
        assert torch.equal(model.generate(ids, **given), model.generate(ids, **given, use_cache=False))


def test_bad_settings_are_refused():
    with pytest.raises(HeadwiseError, match=r"normaliser: one of sum, .*, l2, rms, layer; got 'l1'"):
        swap.SoftmaxAblation(DIM, HEADS, normaliser="l1")
    with pytest.raises(HeadwiseError, match="function is 'exp' or 'taylor'; got 'cosine'"):
        swap.SoftmaxAblation(DIM, HEADS, numerator="cosine")
    with pytest.raises(HeadwiseError, match="order must be at least 0; got -1"):
        swap.Numerator("taylor", order=-1)
    with pytest.raises(HeadwiseError, match="states are at most 131072 wide; order 4 with heads of 64"):
        swap.TaylorRNN(64, 1, order=4)
    with pytest.raises(HeadwiseError, match="scaled dot products only"):
        swap.TaylorRNN(DIM, HEADS, position=swap.Alibi())
