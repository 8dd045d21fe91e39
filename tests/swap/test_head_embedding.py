"""Head embeddings: the algebra of the paper's two variants, and fitting them to a trained layer."""

from __future__ import annotations

import pytest
import torch

from headwise import swap
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, out

MODES = pytest.mark.parametrize("mode", ["mul", "add"])


def make(mode: str, std: float = 0.5, **own) -> swap.HeadEmbeddingAttention:
    torch.manual_seed(0)
    return swap.HeadEmbeddingAttention(DIM, HEADS, mode=mode, init_std=std, causal=True, **own).double()


def reference(layer: swap.HeadEmbeddingAttention, x: torch.Tensor) -> torch.Tensor:
    """Head by head, with keys and values of its own."""
    shared = {n: getattr(layer, f"shared_{n}")(x) for n in "qkv"}
    heads = []
    for h in range(layer.heads):
        q, k, v = (
            s * (1 + getattr(layer, f"{n}_embed")[h]) if layer.mode == "mul" else s + getattr(layer, f"{n}_embed")[h]
            for n, s in shared.items()
        )
        if isinstance(layer.position, swap.Rope):
            here = swap.parts.Places(torch.arange(x.shape[1])[None])
            q, k = (layer.position.turn(part[:, None], here)[:, 0] for part in (q, k))
        s = q @ k.mT / layer.head_dim**0.5
        later = torch.ones(s.shape[1:], dtype=torch.bool).triu(1)
        heads.append(s.masked_fill(later, float("-inf")).softmax(-1) @ v)
    return layer.o_proj(torch.cat(heads, -1))


@MODES
@pytest.mark.parametrize("position", [None, swap.Rope()])
def test_equals_attention_head_by_head(mode: str, position):
    layer = make(mode, position=position, bias=True)
    assert layer.folds == (position is None)
    torch.testing.assert_close(layer(tokens()), reference(layer, tokens()), rtol=0, atol=1e-12)


@MODES
def test_without_embeddings_all_heads_are_one(mode: str):
    layer, one = make(mode, 0.0), swap.Attention(DIM, 1, head_dim=8, causal=True).double()
    for ours, name in zip(
        (layer.shared_q, layer.shared_k, layer.shared_v), ("q_proj", "k_proj", "v_proj"), strict=True
    ):
        setattr(one, name, ours)
    one.o_proj = torch.nn.Identity()
    torch.testing.assert_close(layer(tokens()), layer.o_proj(one(tokens()).repeat(1, 1, HEADS)), rtol=0, atol=1e-12)


def test_added_key_embeddings_are_inert_unless_keys_are_turned():
    for position, equal in ((None, True), (swap.Rope(), False)):
        layer = make("add", position=position)
        before = reference(layer, tokens())
        with torch.no_grad():
            layer.k_embed.mul_(-3)
        assert torch.allclose(reference(layer, tokens()), before, rtol=0, atol=1e-10) == equal
        torch.testing.assert_close(layer(tokens()), reference(layer, tokens()), rtol=0, atol=1e-12)


def test_added_embeddings_are_a_bias_of_keys():
    layer, x = make("add"), tokens()
    k, v = layer.shared_k(x), layer.shared_v(x)
    s = (layer.shared_q(x) @ k.mT)[:, None] + (k @ layer.q_embed.T).mT[:, :, None]
    later = torch.ones(s.shape[2:], dtype=torch.bool).triu(1)
    z = (s / 8**0.5).masked_fill(later, float("-inf")).softmax(-1) @ v[:, None] + layer.v_embed[:, None]
    torch.testing.assert_close(layer(x), layer.o_proj(z.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


def test_counts_of_the_paper():
    n, d = 12, 64
    made, many = swap.HeadEmbeddingAttention(n * d, n), swap.Attention(n * d, n)
    out_size = made.o_proj.weight.numel()
    assert made.parameter_count - out_size == 3 * n * d**2 + 3 * n * d == 149_760
    assert many.parameter_count - out_size == 3 * n**2 * d**2 == 1_769_472
    assert many.parameter_count - made.parameter_count == (3 * n**2 - 3 * n) * d**2 - 3 * n * d


def test_a_cache_holds_one_head():
    layer, cache = make("mul"), swap.Cache()
    with torch.no_grad():
        layer(tokens(1, 7), cache=cache)
    assert {name: tuple(kept.shape) for name, kept in cache.of(layer).grown.items()} == {
        "k": (1, 1, 7, 8), "v": (1, 1, 7, 8),
    }  # fmt: skip


def apart(layer: swap.HeadEmbeddingAttention) -> swap.Attention:
    """The same as a layer with a projection for every head."""
    many = swap.Attention(DIM, HEADS, causal=True, bias=True).double()
    with torch.no_grad():
        for n in "qkv":
            one, e, all_heads = (
                getattr(x, y) for x, y in ((layer, f"shared_{n}"), (layer, f"{n}_embed"), (many, f"{n}_proj"))
            )
            factor, more = (1 + e, 0 * e) if layer.mode == "mul" else (torch.ones_like(e), e)
            all_heads.weight.copy_((factor[..., None] * one.weight).flatten(0, 1))
            all_heads.bias.copy_((factor * one.bias + more).flatten())
    many.o_proj = layer.o_proj
    return many


@pytest.mark.parametrize("mode,init", [("mul", "mean"), ("mul", "svd"), ("add", "mean")])
def test_finds_what_a_layer_is_made_of(mode: str, init: str):
    layer = make(mode, bias=True)
    many = apart(layer)
    torch.testing.assert_close(many(tokens()), layer(tokens()), rtol=0, atol=1e-12)
    for inputs in (None, tokens(8, 30, seed=4)):
        found = swap.HeadEmbeddingAttention.from_mha(many, mode, init, inputs)
        torch.testing.assert_close(found(tokens()), layer(tokens()), rtol=0, atol=1e-9)


def test_inputs_make_the_fit_better_on_them():
    torch.manual_seed(0)
    many = swap.Attention(DIM, HEADS, bias=True).double()
    inputs = tokens(4, 50) * torch.linspace(0.1, 4, DIM) + 2
    wanted = many.q_proj(inputs).unflatten(-1, (HEADS, 8))
    missed = {}
    for mode, init, given in (
        ("mul", "mean", None), ("mul", "mean", inputs), ("mul", "svd", inputs),
        ("add", "mean", None), ("add", "mean", inputs),
    ):  # fmt: skip
        made = swap.HeadEmbeddingAttention.from_mha(many, mode, init, given)
        q = made.told(made.shared_q(inputs)[:, None], made.q_embed).transpose(1, 2)
        missed[mode, init, given is not None] = (q - wanted).square().mean().item()
    assert missed["mul", "svd", True] < missed["mul", "mean", True] < missed["mul", "mean", False]
    assert missed["add", "mean", True] < missed["add", "mean", False]


@MODES
def test_in_a_trained_model(mode: str):
    model = llama(64)
    plain = out(model)
    with swap.convert(model, "head_embedding_attention", mode=mode):
        assert not torch.allclose(out(model), plain)
        given = dict(max_new_tokens=5, do_sample=False)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        cached = model.generate(IDS, attention_mask=mask, **given)
        assert torch.equal(cached, model.generate(IDS, attention_mask=mask, use_cache=False, **given))


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"all heads share one key and value; got kv_heads=2"):
        swap.HeadEmbeddingAttention(DIM, HEADS, 2)
    with pytest.raises(HeadwiseError, match=r"mode: wanted mul or add; got 'sum'"):
        swap.HeadEmbeddingAttention(DIM, HEADS, mode="sum")
    with pytest.raises(HeadwiseError, match=r"wanted mul with mean or svd, or add with mean; got 'add', 'svd'"):
        swap.HeadEmbeddingAttention.from_mha(swap.Attention(DIM, HEADS), "add", "svd")
    with pytest.raises(HeadwiseError, match=r"inputs: wanted rows of 32 numbers; got shape \(5, 3\)"):
        swap.HeadEmbeddingAttention.from_mha(swap.Attention(DIM, HEADS), inputs=torch.zeros(5, 3))
