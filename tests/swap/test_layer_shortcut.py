"""Attention over the outputs of all earlier layers: in itself, and in a trained decoder."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from headwise import swap
from headwise.errors import HeadwiseError
from headwise.study.swap_shortcut import layer_shortcuts
from tests.models.tiny import llama
from tests.swap.test_convert import IDS, gpt2, out, qwen3

DIM, HEADS, STATES = 32, 4, 3


def states(length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, length, STATES, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(depths=(0, 1, 2), **own) -> swap.LayerShortcutAttention:
    torch.manual_seed(0)
    layer = swap.LayerShortcutAttention(DIM, HEADS, depths=depths, **own).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("own", [{}, {"map": "linear", "depth_embedding": True}, {"same_position": True}])
def test_equals_a_loop_over_pairs_of_depth_and_place(own):
    layer, h = made(depths=(0, 2), **own), states()
    read = [f(n(h[:, :, d])) for f, n, d in zip(layer.maps, layer.norms, (0, 2), strict=True)]
    if layer.depth is not None:
        read = [r + e for r, e in zip(read, layer.depth, strict=True)]
    q, wanted = layer.q_proj(layer.norm(h[:, :, -1])), torch.zeros(2, 7, DIM, dtype=torch.float64)
    for b in range(2):
        for t in range(7):
            places = [t] if own.get("same_position") else range(t + 1)
            keys = torch.stack([r[b, s] for s in places for r in read])
            for head in range(HEADS):
                part = slice(8 * head, 8 * head + 8)
                s = layer.k_proj(keys)[:, part] @ q[b, t, part] / math.sqrt(8)
                wanted[b, t, part] = s.softmax(0) @ layer.v_proj(keys)[:, part]
    torch.testing.assert_close(layer(h), layer.o_proj(wanted), rtol=0, atol=1e-10)


def test_the_last_state_alone_is_self_attention():
    torch.manual_seed(0)
    layer = swap.LayerShortcutAttention(DIM, HEADS, depths=[-1], map="identity", position=swap.Rope()).double()
    plain = swap.Attention(DIM, HEADS, causal=True, position=swap.Rope()).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    h = states()
    torch.testing.assert_close(layer(h), plain(layer.norm(h[:, :, -1])), rtol=0, atol=1e-10)


@pytest.mark.parametrize("own", [{"position": swap.Rope()}, {"same_position": True, "kv_heads": 2}])
def test_causal_cached_and_padded(own):
    layer, h = made(**own), states()
    with torch.no_grad():
        whole = layer(h)
        other = h.clone()
        other[:, 5:] = 3.0
        torch.testing.assert_close(layer(other)[:, :5], whole[:, :5], rtol=0, atol=1e-12)
        cache = swap.Cache()
        parts = [layer(part, cache=cache) for part in h.split([3, 1, 3], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
        cache.crop(4)
        torch.testing.assert_close(layer(h[:, 4:], cache=cache), whole[:, 4:], rtol=0, atol=1e-10)
        mask = torch.ones(2, 7, dtype=torch.bool)
        mask[:, 5:] = False
        torch.testing.assert_close(layer(other, mask=mask)[:, :5], whole[:, :5], rtol=0, atol=1e-12)


def test_depth_usage_is_the_attention_summed_over_places():
    layer, h = made(), states()
    usage = layer.depth_usage(h)
    torch.testing.assert_close(usage.sum(-1), torch.ones(2, HEADS, 7, dtype=torch.float64))
    q, k, _, seen, _ = layer.prepared(h, None, None, None)
    s = (q @ k.mT / math.sqrt(8)).masked_fill(~seen.allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(usage, s.unflatten(-1, (7, 3)).sum(-2), rtol=0, atol=1e-10)


def test_gradients_and_flops():
    layer, h = made(), states().requires_grad_()
    assert torch.autograd.gradcheck(layer, (h[:1, :3].detach().requires_grad_(),), fast_mode=True)
    assert layer.flops(8) < layer.flops(16)


@pytest.mark.parametrize("make", [llama, qwen3])
def test_a_trained_decoder_starts_as_it_was(make):
    model = make()
    plain = out(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    padded = out(model, attention_mask=mask)
    with swap.add_shortcut(model) as shortcut:
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)
        torch.testing.assert_close(out(model, attention_mask=mask)[0, 2:], padded[0, 2:], rtol=0, atol=1e-6)
        model(IDS, labels=IDS).loss.backward()
        assert shortcut.attention.o_proj.weight.grad.abs().sum() > 0
    with swap.add_shortcut(model, mode="replace", map="identity"):  # two layers: the only depth is the layer before
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)
    assert torch.equal(out(model), plain)
    assert not hasattr(model.model.layers[-1], "shortcut")


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_converted_decoder_generates_through_caches(mode):
    torch.manual_seed(0)
    model = llama(64)
    with swap.add_shortcut(model, mode=mode, zero_init=False) as shortcut, torch.no_grad():
        whole = model(IDS).logits
        first = model(IDS[:, :4], use_cache=True)
        rest = model(IDS[:, 4:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=1e-5)
        both = [model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)]
        assert torch.equal(*both)
        usage = shortcut.depth_usage(input_ids=IDS)
        torch.testing.assert_close(usage, torch.ones(2, 4, 7, 1))


def test_layers_that_are_called_by_place():
    """GPT-2 hands its layers the cache and the mask by place."""
    model = gpt2()
    plain = out(model)
    with swap.add_shortcut(model) as shortcut, torch.no_grad():
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)
        shortcut.attention.o_proj.weight.normal_()
        whole = out(model)
        first = model(IDS[:, :4], use_cache=True)
        rest = model(IDS[:, 4:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=1e-5)
        mask, places = torch.tensor([[0, 0, 1, 1, 1, 1, 1]]), torch.arange(7)[None]
        alone = model(IDS[:1, 2:], position_ids=places[:, 2:]).logits
        shown = model(IDS[:1], attention_mask=mask, position_ids=places).logits
        torch.testing.assert_close(shown[:, 2:], alone, rtol=0, atol=1e-5)
    assert torch.equal(out(model), plain)


def test_a_host_that_turns_a_part_of_its_heads():
    config = transformers.PhiConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        partial_rotary_factor=0.5, pad_token_id=3,
    )  # fmt: skip
    model = transformers.PhiForCausalLM(config).eval()
    plain = out(model)
    with swap.add_shortcut(model, [0], mode="replace", map="identity"):
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)


def test_encoders_are_refused():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=2))
    for change in (swap.add_shortcut, swap.depth_upscale):
        with pytest.raises(HeadwiseError, match="ViTModel is no decoder of transformers"):
            change(model)


def test_bad_input_is_refused_by_name():
    with pytest.raises(HeadwiseError, match=r"depths wants different numbers of states; got \[1, 1\]"):
        swap.LayerShortcutAttention(DIM, HEADS, depths=[1, 1])
    with pytest.raises(HeadwiseError, match=r"want more states than the 3 given"):
        made(depths=(0, 3))(states())
    with pytest.raises(HeadwiseError, match=r"wants states \[batch, token, state, dim\]"):
        made()(states()[:, :, 0])
    with pytest.raises(HeadwiseError, match=r"Alibi can't count them"):
        swap.LayerShortcutAttention(DIM, HEADS, depths=[0], position=swap.Alibi())
    with pytest.raises(HeadwiseError, match=r"depths wants numbers from 0 to 0; got \[1\]"):
        swap.add_shortcut(llama(), [1])
    with pytest.raises(HeadwiseError, match=r"mode is 'add' or 'replace'"):
        swap.add_shortcut(llama(), mode="beside")


def test_the_study_runs():
    found = layer_shortcuts(seeds=(0,), steps=2, rows=2, layers=3)
    assert found.verdict in ("holds", "fails")
    sizes = found.measured["parameters"].values()
    assert max(sizes) - min(sizes) < 400
