"""A mechanism in a trained model: equal output at the start, caches, and back again."""

from __future__ import annotations

import pytest
import torch
import transformers

import headwise as hw
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


def test_a_converted_model_on_disk_is_no_plain_one(tmp_path):
    swap.convert(llama(), "attention", layers=[0]).save(tmp_path)
    with pytest.raises(HeadwiseError, match=r"holds a converted model .*: load it with headwise\.swap\.load"):
        hw.open_model(tmp_path)
    opened = hw.open_model(swap.load(tmp_path))
    assert [type(site.module).__name__ for site in opened.sites] == ["Attention", "LlamaAttention"]


def test_round_trip_of_several_conversions(tmp_path):
    model = llama().to(torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    one, two = swap.convert(model, "nexus_attention", layers=[0]), swap.convert(model, "smeared_key", layers=[1])
    two.save(tmp_path)
    loaded = swap.load(tmp_path)
    wanted, found = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert out(loaded).dtype == torch.bfloat16
    torch.testing.assert_close(out(loaded), out(model), rtol=0, atol=1e-2)
    assert loaded.generation_config.max_new_tokens == 7
    assert out(swap.load(tmp_path, dtype=torch.float32)).dtype == torch.float32
    two.undo()
    one.undo()
    with pytest.raises(HeadwiseError, match="save: wanted a converted model; got none, it was undone"):
        two.save(tmp_path)


def test_round_trip_of_a_model_that_is_written_by_other_names(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=2)).eval()
    swap.convert(model, "smeared_key", layers=[1]).save(tmp_path)
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(swap.load(tmp_path)(pixels)[0], model(pixels)[0])


@pytest.mark.parametrize(
    "text,message",
    [
        ("[]", r"headwise_swap.json doesn't say what stands where"),
        ('{"model.layers.0.self_attn": {}}', r"headwise_swap.json doesn't say what stands where: KeyError"),
        ('{"layer": {"mechanism": "attention", "own": {}}}', r"LlamaForCausalLM has no layer layer"),
        ('{"model.layers.0.self_attn": {"mechanism": "mine", "own": {}}}', r"one of attention.*got 'mine'"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, text, message):
    swap.convert(llama(), "attention").save(tmp_path)
    (tmp_path / "headwise_swap.json").write_text(text)
    with pytest.raises(HeadwiseError, match=message):
        swap.load(tmp_path)


def test_nothing_is_written_that_could_not_be_read(tmp_path):
    conversion = swap.convert(llama(), "attention", normaliser=swap.Entmax(1.5))
    with pytest.raises(HeadwiseError, match="save: Object of type Entmax is not JSON"):
        conversion.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model = llama()
    swap.add_shortcut(model, mode="replace")
    conversion = swap.convert(model, "attention", layers=[0])
    with pytest.raises(HeadwiseError, match=r"save: wanted a converted model; got model\.layers\.1\.self_attn"):
        conversion.save(tmp_path / "new")


def test_converted_layers_keep_their_numbers():
    model = llama()
    plain = out(model)
    first = swap.convert(model, "attention", layers=[0])
    with pytest.raises(HeadwiseError, match=r"layers\.0\.self_attn.* can't be replaced: it was converted"):
        swap.convert(model, "attention")
    second = swap.convert(model, "attention", layers=[1])
    assert list(second.mechanisms) == ["model.layers.1.self_attn"]
    first.undo()
    second.undo()
    assert torch.equal(out(model), plain)


@pytest.mark.parametrize(
    "own,message",
    [
        ({"layers": 1}, "layers: wanted a list of numbers, or a layout by name; got 1"),
        ({"layers": [0.5]}, r"layers: wanted a list of numbers, or a layout by name; got \[0.5\]"),
        ({"layers": "every3"}, "layers: 'every3' is none of the 2 layers there are"),
        ({"heads": 2}, "attention can't be made with heads: .*heads"),
        ({"wrong": 2}, "attention can't be made with wrong: .*wrong"),
        ({"score": "cosine"}, "Attention: score wants a Score; got 'cosine'"),
        ({"normaliser": 3}, "Attention: normaliser wants a Normaliser; got 3"),
        ({"mechanism": swap.Mechanism}, "mechanism: a class of headwise.swap or one of attention"),
        ({"model": "zoo:llm"}, "convert: model wants a model, opened or not; got 'zoo:llm'"),
        ({"model": torch.nn.Linear(2, 2)}, "convert: Linear has no self-attention layer"),
    ],
)
def test_bad_input_is_refused_by_name(own, message):
    with pytest.raises(HeadwiseError, match=message):
        swap.convert(**{"model": llama(), "mechanism": "attention", **own})


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
