"""Sigmoid attention against a loop, its limits, and what a trained model becomes with it."""

from __future__ import annotations

import math

import pytest
import torch

from headwise import swap
from headwise.attention import Mass, attend
from headwise.attention.call import AttentionCall
from headwise.attention.engine import force_path, run_call
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.swap.attention import PartsForm
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens


def made(**own) -> swap.SigmoidAttention:
    torch.manual_seed(0)
    return swap.SigmoidAttention(DIM, HEADS, causal=True, **own).double().eval()


def weights(b, s: torch.Tensor, seen: torch.Tensor | None = None, **own) -> torch.Tensor:
    return swap.Sigmoid(b, **own)(s, torch.ones_like(s, dtype=torch.bool) if seen is None else seen)


def test_equals_a_loop():
    layer, x = made(b=-2.0, qk_norm=False, kv_heads=2, position=swap.Position()), tokens(1, 6)
    q = layer.q_proj(x).view(6, HEADS, -1)
    k, v = (p(x).view(6, 2, -1) for p in (layer.k_proj, layer.v_proj))
    z = torch.zeros(6, HEADS, 8, dtype=torch.float64)
    for h in range(HEADS):
        for i in range(6):
            for j in range(i + 1):
                s = q[i, h] @ k[j, h // 2] / math.sqrt(8) - 2.0
                z[i, h] += v[j, h // 2] / (1 + torch.exp(-s))
    torch.testing.assert_close(layer(x)[0], layer.o_proj(z.flatten(1)), rtol=0, atol=1e-12)


def test_limits():
    s = torch.randn(1, 1, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with_zero = torch.softmax(torch.stack([s, torch.zeros_like(s)], -1), -1)[..., 0]
    torch.testing.assert_close(weights(0.0, s), with_zero)
    p = torch.softmax(s, -1)
    torch.testing.assert_close(weights("match", s), p / (1 + p))
    torch.testing.assert_close(weights(1.0, s, temperature=0.5), torch.sigmoid(s * math.exp(0.5) + 1.0))
    assert weights(-1e4, s).abs().max() == 0
    x = tokens(1, 1)
    layer = made(b=1e4)
    torch.testing.assert_close(layer(x), layer.o_proj(layer.v_proj(x)))
    seen = torch.arange(5) < torch.tensor([1, 3, 5])[:, None]
    hidden = s.masked_fill(~seen, -math.inf)
    for b in (0.0, "match"):
        assert (weights(b, hidden, seen[None, None])[..., ~seen] == 0).all()
    divided = weights(0.0, hidden, seen[None, None], divide="count")
    torch.testing.assert_close(divided, weights(0.0, hidden, seen[None, None]) / torch.tensor([1, 3, 5])[:, None])


def test_b_is_the_length_of_the_training():
    layer, x = made(), tokens(1, 8)
    with pytest.raises(HeadwiseError, match=r"Sigmoid\(b='auto'\) is -ln of the length it was trained on"):
        layer(x)
    layer.train()(x[:, :5]), layer(x), layer(x[:, :3])
    layer.eval()
    fixed = made(b=-math.log(8))
    fixed.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(tokens(1, 12)), fixed(tokens(1, 12)))
    again = made()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    again.load_state_dict(made().state_dict())
    assert again.normaliser.length == 8


def test_blocks_of_rows_equal_the_whole():
    q, k, v = (torch.randn(1, 2, 300, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    call = AttentionCall(q, k, v, 0.3, Mask(right=0), form=PartsForm(swap.Score(), swap.Sigmoid(-5.7)))
    rows = run_call(call, [], [])
    assert rows.path == "rows"
    whole = torch.sigmoid((q @ k.mT) * 0.3 - 5.7).tril() @ v
    torch.testing.assert_close(rows.out, whole, rtol=0, atol=1e-5)
    assert not call.form.has_kernel(call)


def test_readings_see_row_sums():
    layer, x = made(b=3.0), tokens(1, 6)
    with torch.no_grad(), attend(layer, [Mass(("window:99",))]) as run, force_path("dense"):
        layer(x)
    total = run.tree["text"].dataset["mass"].values
    assert total[..., -1, :].min() > 1.5


def test_in_a_trained_model_weights_become_p_over_one_plus_p():
    model, ids = llama(), torch.tensor([[1, 5, 6, 7, 8, 9]])
    site = model.model.layers[0].self_attn
    seen = {}
    with torch.no_grad():
        model.set_attn_implementation("eager")
        p = model(ids, output_attentions=True).attentions[0]
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        v = site.v_proj(hidden).view(1, 6, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
        wanted = site.o_proj(((p / (1 + p)) @ v).transpose(1, 2).flatten(2))
        with swap.convert(model, "sigmoid_attention", layers=[0]) as conversion:
            (layer,) = conversion.mechanisms.values()
            layer.register_forward_hook(lambda *a: seen.update(new=a[2]))
            model(ids)
    torch.testing.assert_close(seen["new"], wanted, rtol=0, atol=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(HeadwiseError, match="b is a number, 'auto' or 'match'; got 'best'"):
        swap.Sigmoid("best")
    with pytest.raises(HeadwiseError, match="divide is None, 'count' or 'sqrt'; got 'sum'"):
        swap.SigmoidAttention(DIM, HEADS, divide="sum")
