"""A mechanism in a trained model: equal output at the start, caches, and back again."""

from __future__ import annotations

import pytest
import torch
import transformers

from headwise import swap
from headwise.attention import Mass, attend
from headwise.errors import HeadwiseError
from headwise.swap.convert import chosen_layers
from tests.models.tiny import llama

SMALL = dict(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)


def qwen3() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, pad_token_id=3)
    return transformers.Qwen3ForCausalLM(config).eval()


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10], [1, 11, 12, 5, 6, 13, 14]])


def out(model, **given) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **given)[0]


@pytest.mark.parametrize("make", [llama, qwen3, gpt2, bert])
def test_equal_at_the_start_and_whole_again_after(make):
    model = make()
    plain = out(model)
    padded = out(model, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]))
    with swap.convert(model, "attention") as conversion:
        assert len(conversion.mechanisms) == 2
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)
        again = out(model, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]))
        torch.testing.assert_close(again[0, 2:], padded[0, 2:], rtol=0, atol=1e-6)
        torch.testing.assert_close(again[1], padded[1], rtol=0, atol=1e-6)
    assert torch.equal(out(model), plain)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generates_the_same(how):
    model = llama(64)
    given = dict(max_new_tokens=6, do_sample=False, **how)
    plain = model.generate(IDS, **given)
    with swap.convert(model, "attention", layers=[1]):
        assert torch.equal(model.generate(IDS, **given), plain)


def test_a_static_cache_is_refused():
    model = llama(64)
    with swap.convert(model, "attention"), pytest.raises(HeadwiseError, match="DynamicCache; got StaticCache"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")


def test_a_scan_sees_a_converted_model():
    model = llama()
    values = []
    for converted in (False, True):
        conversion = swap.convert(model, "attention") if converted else None
        with attend(model, [Mass(("first",))]) as run:
            out(model)
        values.append(run.tree["text"].dataset["mass"].values)
        if conversion is not None:
            conversion.undo()
    assert values[0].shape == values[1].shape
    assert abs(values[0] - values[1]).max() < 1e-6


def test_round_trip_on_disk(tmp_path):
    model = llama()
    conversion = swap.convert(model, "attention", layers="odd", qk_norm=True)
    with torch.no_grad():
        for mechanism in conversion.mechanisms.values():
            mechanism.q_norm.weight.mul_(1.5)
    wanted = out(model)
    conversion.save(tmp_path)
    assert torch.equal(out(swap.load(tmp_path)), wanted)
    conversion.undo()
    with pytest.raises(HeadwiseError, match=r"headwise_swap.json"):
        swap.load(tmp_path.parent)


def test_a_layer_that_fails_leaves_the_model_whole(monkeypatch):
    model, made = llama(), []
    plain, own = out(model), swap.Attention.from_site.__func__

    def second_fails(cls, *args, **given):
        made.append(own(cls, *args, **given))
        if len(made) > 1:
            raise HeadwiseError("no second layer")
        return made[0]

    monkeypatch.setattr(swap.Attention, "from_site", classmethod(second_fails))
    with pytest.raises(HeadwiseError, match="no second layer"):
        swap.convert(model, "attention")
    assert not any(isinstance(module, swap.Mechanism) for module in model.modules())
    assert torch.equal(out(model), plain)


def test_layouts():
    assert chosen_layers("odd", 6) == [0, 2, 4]
    assert chosen_layers("25%", 8) == [3, 7]
    assert chosen_layers("every3", 8) == [2, 5]
    assert chosen_layers("bilateral", 6) == [0, 5]
    with pytest.raises(HeadwiseError, match=r"layers: wanted numbers from 0 to 5, at least one; got \[6\]"):
        chosen_layers([6], 6)
    with pytest.raises(HeadwiseError, match=r"layers: numbers, everyN, or one of all"):
        chosen_layers("some", 6)


def test_what_cannot_be_replaced_says_why():
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=3
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(HeadwiseError, match=r"can't be replaced: its layers hand a position bias on"):
        swap.convert(model, "attention")
