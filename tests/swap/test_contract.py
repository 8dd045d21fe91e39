"""What the room promises of every mechanism, tested on all of them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headwise import swap
from headwise.attention import Entropy, Map, attend
from headwise.errors import HeadwiseError
from tests.swap.cases import CASES, DIM, HEADS, LENGTH, Case, make, tokens

ALL = [pytest.param(name, case, id=f"{name}-{n}") for name, cases in CASES.items() for n, case in enumerate(cases)]
CAUSAL = [p for p in ALL if swap.MECHANISMS[p.values[0]].causal_too]
CROSS = [p for p in ALL if swap.MECHANISMS[p.values[0]].context_too]
ROWS_APART = [p for p in CAUSAL if p.values[0] != "super_attention"]  # which mixes tokens by their places in the row
READABLE = [p for p in ALL if p.values[1].readable]


def test_every_mechanism_is_tested():
    assert set(CASES) == set(swap.MECHANISMS)


@pytest.mark.parametrize("name", swap.MECHANISMS)
def test_says_what_it_is(name: str):
    kind = swap.MECHANISMS[name]
    assert all((kind.what, kind.paper.title, kind.paper.arxiv, kind.__doc__))


@pytest.mark.parametrize("name,case", CAUSAL)
def test_the_future_does_not_change_the_past(name: str, case: Case):
    layer, x = make(name, case, causal=True), tokens()
    other = x.clone()
    other[:, 7:] = tokens(seed=5)[:, 7:] * 3
    torch.testing.assert_close(layer(x)[:, :7], layer(other)[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(layer(x)[:, 7:], layer(other)[:, 7:])


@pytest.mark.parametrize("name,case", CAUSAL)
def test_decoding_through_a_cache_equals_the_full_pass(name: str, case: Case):
    layer, x = make(name, case, causal=True), tokens()
    cache = swap.Cache()
    with torch.no_grad():
        whole = layer(x)
        parts = [layer(part, cache=cache) for part in x.split([5, 1, 1, 2, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("name,case", CAUSAL)
def test_a_cache_follows_the_beams(name: str, case: Case):
    layer, x = make(name, case, causal=True), tokens()
    cache, rows = swap.Cache(), torch.tensor([1, 0])
    with torch.no_grad():
        layer(x[:, :8], cache=cache)
        cache.reorder(rows)
        torch.testing.assert_close(layer(x[rows, 8:], cache=cache), layer(x)[rows, 8:], rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("name,case", ALL)
def test_padding_does_not_change_the_tokens(name: str, case: Case):
    causal = swap.MECHANISMS[name].causal_too
    layer, x = make(name, case, causal), tokens()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, 9:] = False
    other = x.clone()
    other[:, 9:] = 5.0
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask=mask)[:, :9], layer(other, mask=mask)[:, :9], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name,case", ROWS_APART)
def test_a_padded_row_gives_what_its_tokens_give_alone(name: str, case: Case):
    layer, x = make(name, case, causal=True), tokens()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :4] = False
    places = torch.stack([torch.arange(LENGTH) - 4, torch.arange(LENGTH)]).clamp(min=0)
    with torch.no_grad():
        y = layer(x, mask=mask, positions=places)
        torch.testing.assert_close(y[:1, 4:], layer(x[:1, 4:]), rtol=0, atol=1e-8)
        torch.testing.assert_close(y[1:], layer(x[1:]), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name,case", ROWS_APART)
def test_packed_documents_are_apart(name: str, case: Case):
    layer, x = make(name, case, causal=True), tokens()
    of = torch.arange(LENGTH) >= 5
    places = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None]
    with torch.no_grad():
        y = layer(x, mask=(of[:, None] == of)[None, None], positions=places)
        apart = torch.cat([layer(x[:, :5]), layer(x[:, 5:])], 1)
    torch.testing.assert_close(y, apart, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name,case", ALL)
def test_a_row_of_padding_is_finite_with_its_gradients(name: str, case: Case):
    layer, x = make(name, case, swap.MECHANISMS[name].causal_too), tokens().requires_grad_()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0] = False
    y = layer(x, mask=mask)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("name,case", ALL)
def test_trains_under_autocast(name: str, case: Case):
    layer = make(name, replace(case, own=copy.deepcopy(case.own)), swap.MECHANISMS[name].causal_too).float().train()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(tokens().float())
    (y.float().square().mean() + (0 if layer.aux_loss is None else layer.aux_loss)).backward()
    idle = {name for name, p in layer.named_parameters() if p.grad is None}
    assert idle <= {"k_embed"}  # of head embeddings that are added, where nothing turns the keys
    if layer.causal:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            cache = swap.Cache()
            assert all(layer.eval()(part, cache=cache).isfinite().all() for part in tokens().float().split(6, 1))


@pytest.mark.parametrize("name,case", CAUSAL)
def test_no_tokens(name: str, case: Case):
    layer = make(name, case, causal=True)
    assert layer(tokens()[:, :0]).shape == (2, 0, DIM)
    assert layer(tokens()[:0]).shape == (0, LENGTH, DIM)


@pytest.mark.parametrize("name,case", CROSS)
def test_a_context_of_nothing(name: str, case: Case):
    if name == "multi_token_attention":
        pytest.skip("its kernels want keys")
    assert make(name, case, causal=False)(tokens(), context=tokens()[:, :0]).isfinite().all()


@pytest.mark.parametrize("name,case", ALL)
def test_gradients(name: str, case: Case):
    layer, x = make(name, case, swap.MECHANISMS[name].causal_too), tokens(1, 5).requires_grad_()
    weight = tokens(1, 5, seed=9)
    (grad,) = torch.autograd.grad((layer(x) * weight).sum(), x)
    step, direction = 1e-6, tokens(1, 5, seed=3)
    with torch.no_grad():
        ahead, behind = ((layer(x + sign * step * direction) * weight).sum() for sign in (1, -1))
    assert (grad * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name,case", ALL)
def test_counts_its_parameters(name: str, case: Case):
    if case.formula is None:
        pytest.skip("the paper gives no formula")
    layer = make(name, case, swap.MECHANISMS[name].causal_too)
    assert layer.parameter_count == case.formula(DIM, HEADS, layer.kv_heads, layer.head_dim)


@pytest.mark.parametrize("name,case", ALL)
def test_flops_grow_with_the_length(name: str, case: Case):
    layer = make(name, case, swap.MECHANISMS[name].causal_too)
    assert 0 < layer.flops(64) < layer.flops(128)


@pytest.mark.parametrize("name,case", ALL)
def test_counts_its_products(name: str, case: Case):
    """As PyTorch counts them; beside products some count what they do to single numbers."""
    own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(q: tuple, k: tuple, v: tuple, *_, **__) -> int:
        return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])

    layer = make(name, case, swap.MECHANISMS[name].causal_too)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={own: attention}) as counter:
        layer(tokens(1))
    assert 1 <= layer.flops(LENGTH) / counter.get_total_flops() < 1.2


@pytest.mark.parametrize("name,case", READABLE)
def test_readings_leave_it_as_it_is(name: str, case: Case):
    layer, x = make(name, case, swap.MECHANISMS[name].causal_too), tokens()
    with torch.no_grad():
        plain = layer(x)
        with attend(layer, [Map(), Entropy()]) as run:
            torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-12)
    assert run.paths


@pytest.mark.parametrize("name,case", CROSS)
def test_attends_to_a_context(name: str, case: Case):
    layer, x, context = make(name, case, causal=False), tokens(2, 5), tokens(2, 9, seed=4)
    out = layer(x, context=context)
    assert out.shape == x.shape
    assert not torch.allclose(out, layer(x, context=context.flip(0)))


@pytest.mark.parametrize("name,case", ALL)
def test_survives_a_copy_and_a_state_dict(name: str, case: Case):
    causal = swap.MECHANISMS[name].causal_too
    layer, x = make(name, case, causal), tokens()
    other = make(name, case, causal, seed=7)
    other.load_state_dict(copy.deepcopy(layer).state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


def test_bad_sizes_are_refused_by_name():
    with pytest.raises(HeadwiseError, match=r"heads a multiple of kv_heads; got dim=32, heads=4, kv_heads=3"):
        swap.Attention(32, 4, 3)
    with pytest.raises(HeadwiseError, match=r"dim 30 is no multiple of 4 heads"):
        swap.Attention(30, 4)
    with pytest.raises(HeadwiseError, match=r"mechanism: one of attention.*got 'unknown'"):
        swap.make("unknown", 32, 4)
    with pytest.raises(HeadwiseError, match=r"mask wants bools"):
        swap.Attention(32, 4)(tokens().float(), mask=torch.zeros(2, LENGTH))
    with pytest.raises(HeadwiseError, match=r"a cache is for causal mechanisms"):
        swap.Attention(32, 4)(tokens().float(), cache=swap.Cache())
