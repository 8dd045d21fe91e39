"""Context broadcasting: its algebra, causal means, and in models of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from headwise import swap
from headwise.errors import HeadwiseError
from tests.models.tiny import llama
from tests.swap.cases import DIM, LENGTH, tokens

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


def bert() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=32, **SMALL)).eval()


def vit() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **SMALL)).eval()


def test_twice_is_a_quarter_and_three_quarters_mean():
    x = tokens()
    once = swap.ContextBroadcast()(x)
    torch.testing.assert_close(once, (x + x.mean(1, keepdim=True)) / 2)
    torch.testing.assert_close(swap.ContextBroadcast()(once), x / 4 + 0.75 * x.mean(1, keepdim=True))
    torch.testing.assert_close(once.mean(1), x.mean(1))


def test_constant_tokens_stay():
    x = tokens(2, 1).expand(-1, LENGTH, -1)
    torch.testing.assert_close(swap.ContextBroadcast()(x), x)
    torch.testing.assert_close(swap.ContextBroadcast(causal=True)(x), x)


@pytest.mark.parametrize("mode", ["scaled", "convex"])
def test_starts_as_nothing(mode):
    made, x = swap.ContextBroadcast(DIM, mode).double(), tokens()
    assert torch.equal(made(x), x)
    with torch.no_grad():
        made.share.copy_(torch.linspace(-1, 1, DIM))
    own = x if mode == "scaled" else x * (1 - made.share)
    torch.testing.assert_close(made(x), own + made.share * x.mean(1, keepdim=True))


def test_padding_and_the_first_token_stay_out():
    x, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 7:] = False
    made = swap.ContextBroadcast(exclude_first=True)(x, mask)
    torch.testing.assert_close(made[1, 3], (x[1, 3] + x[1, 1:7].mean(0)) / 2)
    torch.testing.assert_close(made[0, 0], (x[0, 0] + x[0, 1:].mean(0)) / 2)


def test_causal_means_see_no_future_and_go_on_from_a_cache():
    made, x, cache = swap.ContextBroadcast(causal=True).double(), tokens(), swap.Cache()
    whole = made(x)
    for t in range(LENGTH):
        torch.testing.assert_close(whole[:, t], (x[:, t] + x[:, : t + 1].mean(1)) / 2)
    parts = [made(part, cache=cache) for part in x.split([5, 1, 2, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["mlp_end", "mlp_mid", "mlp_front"])
def test_in_a_model(where):
    """Hooks on the last block alone against the block's own parts by hand."""
    model, ids = bert(), torch.arange(9)[None]
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True)
        block = model.encoder.layer[1]
        attended = block.attention(plain.hidden_states[1])[0]
        broadcast = swap.ContextBroadcast()
        front = broadcast(attended) if where == "mlp_front" else attended
        mid = block.intermediate(front)
        end = block.output.dense(broadcast(mid) if where == "mlp_mid" else mid)
        end = broadcast(end) if where == "mlp_end" else end
        wanted = block.output.LayerNorm(end + attended)
        with swap.broadcast_context(model, where=where, layers=[1]) as made:
            torch.testing.assert_close(model(ids).last_hidden_state, wanted)
            assert list(made.modules) == ["encoder.layer.1"]
        assert torch.equal(model(ids).last_hidden_state, plain.last_hidden_state)
    assert not any("context_broadcast" in name for name, _ in model.named_modules())


def test_padding_of_a_model_stays_out():
    model, ids = bert(), torch.arange(9)[None]
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    with torch.no_grad(), swap.broadcast_context(model):
        short, padded = model(ids[:, :6]).last_hidden_state, model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(padded[:, :6], short, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [vit, llama])
@pytest.mark.parametrize("where", ["mlp_end", "mlp_mid", "mlp_front"])
def test_scaled_starts_as_the_model_and_learns(make, where):
    model = make()
    given = {"input_ids": torch.arange(9)[None]} if make is llama else {"pixel_values": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        plain = model(**given)[0]
    with swap.broadcast_context(model, where=where, mode="scaled") as made:
        out = model(**given)[0]
        assert torch.equal(out, plain)
        out.square().sum().backward()
        assert {id(m.share) for m in made.modules.values()} <= {id(p) for p in model.parameters()}
        assert all(m.share.grad.abs().sum() > 0 for m in made.modules.values())


def test_a_causal_model_stays_causal_and_refuses_its_cache():
    model, ids = llama(64), torch.arange(10)[None]
    other = ids.clone()
    other[:, 6:] = 3
    with torch.no_grad(), swap.broadcast_context(model):
        torch.testing.assert_close(model(ids).logits[:, :6], model(other).logits[:, :6])
        start = model(ids, use_cache=True)
        with pytest.raises(HeadwiseError, match="use_cache=False"):
            model(ids[:, :1], past_key_values=start.past_key_values)


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"mode is mean, scaled or convex; got 'max'"):
        swap.ContextBroadcast(mode="max")
    with pytest.raises(HeadwiseError, match=r"dim is for the modes"):
        swap.ContextBroadcast(mode="scaled")
    with pytest.raises(HeadwiseError, match=r"leaves that without any"):
        swap.ContextBroadcast(causal=True, exclude_first=True)
    with pytest.raises(HeadwiseError, match=r"make it with causal=True"):
        swap.ContextBroadcast()(tokens(), cache=swap.Cache())
    with pytest.raises(HeadwiseError, match=r"where: one of mlp_end.*got 'start'"):
        swap.broadcast_context(bert(), where="start")
    model = bert()
    with swap.broadcast_context(model), pytest.raises(HeadwiseError, match=r"has it already"):
        swap.broadcast_context(model)
