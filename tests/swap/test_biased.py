"""The slot for surplus attention, and weights that are not normalised, against loops."""

from __future__ import annotations

import math

import pytest
import torch

from headwise import swap
from headwise.attention import Mass, attend
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens


def project(layer: swap.Attention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v [head, token, width] of one sequence, keys repeated for every query head."""
    parts = (p(x[0]).view(x.shape[1], -1, 8).transpose(0, 1) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = parts
    return q, *(t.repeat_interleave(HEADS // len(t), 0) for t in (k, v))


def joined(layer: swap.Attention, z: torch.Tensor) -> torch.Tensor:
    return layer.o_proj(z.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("own", [{}, {"v_bias": True}, {"v_bias": True, "per_head": False}])
def test_a_slot_is_one_more_key(own):
    torch.manual_seed(0)
    layer, x = swap.BiasedAttention(DIM, HEADS, 2, causal=True, **own).double(), tokens(1, 6)
    with torch.no_grad():
        layer.k_slot.mul_(40)
        q, k, v = project(layer, x)
        slots = layer.k_slot if len(layer.k_slot) == 1 else layer.k_slot.repeat_interleave(2, 0)
        values = 0 * slots if layer.v_slot is None else layer.v_slot
        values = values if len(values) in (1, HEADS) else values.repeat_interleave(2, 0)
        k, v = (torch.cat([a.expand(HEADS, 1, 8), b], 1) for a, b in ((slots, k), (values, v)))
        s = q @ k.mT / math.sqrt(8)
        hidden = torch.arange(7) > torch.arange(1, 7)[:, None]
        a = torch.softmax(s.masked_fill(hidden, -math.inf), -1)
        torch.testing.assert_close(layer(x)[0], joined(layer, a @ v), rtol=0, atol=1e-12)
        with attend(layer, [Mass(("window:99",))]) as run:
            layer(x)
        total = run.tree["text"].dataset["mass"].values[..., 0]
    assert abs(total.reshape(HEADS, 6) + a[..., 0].numpy() - 1).max() < 1e-6


def test_a_slot_far_below_all_keys_is_none():
    torch.manual_seed(0)
    layer = swap.BiasedAttention(DIM, HEADS, causal=True, bias=True).double()
    plain = swap.Attention(DIM, HEADS, causal=True, bias=True).double()
    with torch.no_grad():
        layer.q_proj.weight.zero_()
        layer.k_slot.copy_(-1e4 * layer.q_proj.bias.view(HEADS, 1, 8))
        plain.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(layer(tokens()), plain(tokens()), rtol=0, atol=1e-12)


def test_a_value_alone_is_added():
    torch.manual_seed(0)
    layer, x = swap.BiasedAttention(DIM, HEADS, 2, k_bias=False, v_bias=True).double(), tokens(1, 6)
    q, k, v = project(layer, x)
    z = torch.softmax(q @ k.mT / math.sqrt(8), -1) @ v + layer.v_slot.repeat_interleave(2, 0)
    torch.testing.assert_close(layer(x)[0], joined(layer, z), rtol=0, atol=1e-12)


def test_the_slot_takes_its_share_in_a_trained_model():
    model, ids = llama(), torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        plain = model(ids).logits
        with swap.convert(model, "biased_attention") as conversion:
            assert not torch.allclose(model(ids).logits, plain, atol=1e-5)
            for layer in conversion.mechanisms.values():
                layer.k_slot = None  # as if it had none
            torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-6)


FUNCTIONS = {"sigmoid": torch.sigmoid, "elu1": lambda s: torch.where(s > 0, s + 1, s.exp()), "softmax": torch.exp}


@pytest.mark.parametrize(
    "function,normalise", [("sigmoid", 0), ("sigmoid", 1), ("elu1", 0), ("elu1", 1), ("softmax", 1)]
)
def test_functions_of_scores(function, normalise):
    torch.manual_seed(0)
    layer = swap.ScoreActivation(DIM, HEADS, causal=True, function=function, normalise=bool(normalise)).double()
    x = tokens(1, 6)
    q, k, v = project(layer, x)
    a = FUNCTIONS[function](q @ k.mT / math.sqrt(8)).tril()
    a = a / (a.sum(-1, keepdim=True) + 1e-8) if normalise else a
    torch.testing.assert_close(layer(x)[0], joined(layer, a @ v), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kernel", ["identity", "elu1", "relu", "mlp"])
@pytest.mark.parametrize("normalise", [False, True])
def test_kernels(kernel, normalise):
    torch.manual_seed(0)
    layer = swap.KernelAttention(DIM, HEADS, causal=True, kernel=kernel, normalise=normalise).double()
    x = 3 * tokens(1, 6)
    q, k, v = project(layer, x)
    phi = {"elu1": FUNCTIONS["elu1"], "relu": torch.relu}.get(kernel, layer.score.phi)
    a = (phi(q) @ phi(k).mT / math.sqrt(8)).tril()
    if normalise:
        total = a.sum(-1, keepdim=True)
        a = a / (total + 1e-8 if kernel in ("elu1", "relu") else total.abs().clamp(min=1))
    torch.testing.assert_close(layer(x)[0], joined(layer, a @ v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["elu1", "mlp"])
def test_half_precision(kernel):
    torch.manual_seed(0)
    layer, x = swap.KernelAttention(DIM, HEADS, causal=True, kernel=kernel, normalise=True), tokens().float()
    wanted = layer(x)
    out = layer.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_bad_settings_are_refused():
    with pytest.raises(HeadwiseError, match="leave out score and normaliser"):
        swap.BiasedAttention(DIM, HEADS, normaliser=swap.Sigmoid(0.0))
    with pytest.raises(HeadwiseError, match="kernel: one of identity, elu1, relu, mlp; got 'cosine'"):
        swap.KernelAttention(DIM, HEADS, kernel="cosine")
    with pytest.raises(HeadwiseError, match="softmax is normalised by what it is"):
        swap.ScoreActivation(DIM, HEADS, function="softmax")
    with pytest.raises(HeadwiseError, match="function is one of relu, sigmoid, elu1, exp; got 'tanh'"):
        swap.ScoreActivation(DIM, HEADS, function="tanh")
