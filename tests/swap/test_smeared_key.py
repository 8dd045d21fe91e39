"""Smeared keys against a loop, with padding, with other attentions, and in a trained model."""

from __future__ import annotations

import pytest
import torch

from headwise import swap
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, out


class SmearedSigmoid(swap.SmearedKey, swap.SigmoidAttention):
    """Two mechanisms as one."""


def made(cls=swap.SmearedKey, **own) -> swap.SmearedKey:
    torch.manual_seed(0)
    layer = cls(DIM, HEADS, 2, causal=True, **own).double()
    with torch.no_grad():
        layer.alpha.add_(torch.randn_like(layer.alpha))
    return layer


def test_equals_a_loop():
    layer, x = made(), tokens(1, 6)
    q = layer.q_proj(x).view(6, HEADS, 8)
    k, v = (p(x).view(6, 2, 8) for p in (layer.k_proj, layer.v_proj))
    z = torch.zeros(6, HEADS, 8, dtype=torch.float64)
    for h in range(HEADS):
        share = torch.sigmoid(layer.alpha[h // 2, 0, 0])
        for i in range(6):
            keys = [share * k[j, h // 2] + (1 - share) * k[max(j - 1, 0), h // 2] for j in range(i + 1)]
            weights = (torch.stack(keys) @ q[i, h] / 8**0.5).softmax(0)
            z[i, h] = weights @ v[: i + 1, h // 2]
    torch.testing.assert_close(layer(x)[0], layer.o_proj(z.flatten(1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls,plain", [(swap.SmearedKey, swap.Attention), (SmearedSigmoid, swap.SigmoidAttention)])
def test_a_share_of_one_is_the_plain_mechanism(cls, plain):
    own = {"b": -2.0} if plain is swap.SigmoidAttention else {"position": swap.Rope()}
    layer, other = made(cls, **own), plain(DIM, HEADS, 2, causal=True, **own).double()
    other.load_state_dict(layer.state_dict(), strict=False)
    assert not torch.allclose(layer(tokens()), other(tokens()))
    with torch.no_grad():
        layer.alpha.fill_(float("inf"))
    torch.testing.assert_close(layer(tokens()), other(tokens()), rtol=0, atol=1e-12)


def test_nothing_is_taken_from_a_hidden_token():
    layer, x = made(position=swap.Rope()), tokens(1, 8)
    alone = layer(x[:, 3:])
    padded = torch.arange(8)[None] >= 3
    packed = (torch.arange(8)[:, None] >= 3) == (torch.arange(8) >= 3)
    for mask in (padded, packed[None, None]):
        torch.testing.assert_close(layer(x, mask=mask)[:, 3:], alone, rtol=0, atol=1e-12)
    cache = swap.Cache()
    with torch.no_grad():
        parts = [layer(part, mask=padded[:, :end], cache=cache) for part, end in zip(x.split(2, 1), (2, 4, 6, 8))]
    torch.testing.assert_close(torch.cat(parts, 1)[:, 3:], alone, rtol=0, atol=1e-12)


def test_in_a_trained_model():
    model = llama(64)
    plain = out(model)
    with swap.convert(model, "smeared_key", smear=30.0):
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)
    with swap.convert(model, "smeared_key"):
        assert not torch.allclose(out(model), plain)
        given = dict(max_new_tokens=4, do_sample=False)
        for how in ({}, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}):
            cached = model.generate(IDS, **given, **how)
            assert torch.equal(cached, model.generate(IDS, use_cache=False, **given, **how))
            short = model.generate(IDS[:1, 2:], **given)
        assert torch.equal(cached[0, 2:], short[0])


def test_bad_use_is_refused():
    class Headed(swap.SmearedKey, swap.HeadEmbeddingAttention):
        pass

    with pytest.raises(HeadwiseError, match="Headed makes its keys in a way of its own"):
        Headed(DIM, HEADS)(tokens().float())
    with pytest.raises(HeadwiseError, match="leave out context"):
        made()(tokens(), context=tokens())
