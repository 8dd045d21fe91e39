"""Token-aware phase attention against the printed formula, and its limits."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from headwise import swap
from headwise.attention.call import AttentionCall
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.swap.attention import PartsForm
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, out


def made(**own) -> swap.TokenAwarePhaseAttention:
    torch.manual_seed(0)
    return swap.TokenAwarePhaseAttention(DIM, HEADS, causal=True, **own).double()


@pytest.mark.parametrize("phase", ["quadratic", "linear"])
def test_equals_a_loop(phase: str):
    layer, x = made(phase=phase, kv_heads=2, theta=0.75), tokens(1, 6)
    q, k, v = (p(x).view(6, -1, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    z = torch.zeros(6, HEADS, 8, dtype=torch.float64)
    for h in range(HEADS):
        for m in range(6):
            s = torch.zeros(m + 1, dtype=torch.float64)
            for n in range(m + 1):
                (qa, qp), (ka, kp) = q[m, h].split([6, 2]), k[n, h // 2].split([6, 2])
                angle = qp @ kp if phase == "quadratic" else qp.sum() + kp.sum()
                turn = 2 * math.pi * (abs(m - n) ** 0.1 if m != n else 0) * angle / math.sqrt(2)
                s[n] = qa @ ka / math.sqrt(6) * torch.cos(turn)
            z[m, h] = s.softmax(0) @ v[: m + 1, h // 2]
    torch.testing.assert_close(layer(x)[0], layer.o_proj(z.flatten(1)), rtol=0, atol=1e-12)


def test_without_a_phase_it_is_plain_attention_of_the_amplitude():
    layer, x = made(), tokens()
    with torch.no_grad():
        layer.q_proj.weight.unflatten(0, (HEADS, 8))[:, 4:] = 0
    plain = swap.Attention(DIM, HEADS, head_dim=4, value_dim=8, causal=True).double()
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            weight = getattr(layer, name).weight.unflatten(0, (HEADS, 8))[:, :4]
            getattr(plain, name).weight.copy_(weight.flatten(0, 1))
    plain.v_proj, plain.o_proj = layer.v_proj, layer.o_proj
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)


def scores(alpha: float, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (torch.randn(1, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    call = AttentionCall(q, k, k, 1.0, Mask(right=0), i=torch.arange(first, first + 5), j0=first)
    return swap.Phase(alpha)(q, k, call), q[..., :4] @ k[..., :4].mT / 2


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_a_token_is_in_phase_with_itself_and_only_distances_count(alpha: float):
    s, amplitude = scores(alpha)
    torch.testing.assert_close(s.diagonal(dim1=2, dim2=3), amplitude.diagonal(dim1=2, dim2=3))
    assert not torch.allclose(s, amplitude)
    torch.testing.assert_close(scores(alpha, first=1000)[0], s, rtol=0, atol=1e-12)


def test_the_expected_score_fades_and_its_variance_stays():
    """Theorem of the paper, on 20,000 pairs with mean 0.3: at distance 0 the mean is 16 * 0.09 / 4 = 0.36."""
    generator = torch.Generator().manual_seed(0)
    q, k = (0.3 + torch.randn(1, 20_000, 1, 32, generator=generator) for _ in "qk")
    amplitude = (q[..., :16] * k[..., :16]).sum(-1) / 4
    for distance in (0, 1, 100, 1000):
        s = swap.Phase()(q, k, AttentionCall(q, k, k, 1.0, i=torch.tensor([distance])))
        assert s.mean().item() == pytest.approx(0.36 if distance == 0 else 0, abs=0.03)
        ratio = (s.var() / (amplitude**2).mean()).item()
        assert ratio > 0.8 if distance == 0 else 0.45 < ratio < 0.55


@pytest.mark.parametrize("first,causal", [(0, False), (9, True)])
def test_the_kernel_is_told_what_the_call_says(first: int, causal: bool, monkeypatch):
    """In Triton's interpreter: grouped keys, padding, and queries that come after keys of a cache."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, rows, 32, generator=generator) for heads, rows in ((4, 8), (2, 17), (2, 17)))
    valid = torch.rand(2, 17, generator=generator) > 0.2
    valid[:, 0] = True
    mask = Mask(right=0 if causal else None, key_valid=valid, batch=2)
    call = AttentionCall(q, k, v, 1.0, mask, i=torch.arange(first, first + 8))
    form = PartsForm(swap.Phase(theta=0.75), swap.Softmax())
    assert not form.has_kernel(call)  # not on a CPU
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    s = form.scores(q, k, call).masked_fill(~mask.dense(call.i, 0, 17), float("-inf"))
    torch.testing.assert_close(form.kernel(call), s.softmax(-1) @ v, rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_equals_the_plain_way(causal: bool):
    layer = swap.TokenAwarePhaseAttention(128, 2, causal=causal).cuda()
    x = torch.randn(2, 70, 128, device="cuda", requires_grad=True)
    valid = torch.ones(2, 70, dtype=torch.bool, device="cuda")
    valid[:, 60:] = False
    found = []
    for mask in (valid, valid[:, None, None].expand(2, 1, 70, 70)):  # a mask of pairs goes the plain way
        y = layer(x, mask=mask)[:, :60]
        found.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_in_a_trained_model():
    model = llama(64)
    plain = out(model)
    with swap.convert(model, "token_aware_phase_attention") as conversion:
        for layer in conversion.mechanisms.values():
            assert type(layer.position) is swap.Position
        assert not torch.allclose(out(model), plain)
        given = dict(max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(IDS, **given), model.generate(IDS, use_cache=False, **given))


def test_bad_settings_are_refused():
    with pytest.raises(HeadwiseError, match=r"0 < theta < 1; got alpha=0.1, theta=1.0"):
        swap.Phase(theta=1.0)
    with pytest.raises(HeadwiseError, match="phase is quadratic or linear; got 'cubic'"):
        swap.Phase(phase="cubic")
    with pytest.raises(HeadwiseError, match=r"theta=0.1 gives 0 of 8 dims to the amplitude"):
        swap.TokenAwarePhaseAttention(DIM, HEADS, theta=0.1)
