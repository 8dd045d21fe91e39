"""Opening models: what comes back, what may go in, and clear words for everything else."""

import copy

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from headwise.errors import HeadwiseError
from headwise.models import open_model

from .tiny import llama, t5, word_tokenizer


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_folder(folder):
    opened = open_model(folder, device="cpu")
    assert type(opened.model) is transformers.LlamaForCausalLM
    assert not opened.model.training
    assert opened.name == folder.name
    assert opened.streams == ["text"]
    assert opened.max_positions == 16
    batch = opened.encode("the cat sat")
    assert batch["input_ids"].shape == (1, 3)
    assert torch.equal(opened.model(**batch).logits, llama()(**batch).logits)
    assert opened.decode(batch["input_ids"]) == ["the cat sat"]
    assert opened.decode(batch["input_ids"][0]) == "the cat sat"


def test_the_class_comes_from_the_config(tmp_path):
    llama().model.save_pretrained(tmp_path)
    assert type(open_model(tmp_path).model) is transformers.LlamaModel


def test_dtype(folder):
    assert open_model(folder, dtype="bfloat16", device="cpu").model.dtype is torch.bfloat16
    with pytest.raises(HeadwiseError, match="no 'float33'"):
        open_model(folder, dtype="float33")


def test_a_module_passes_through():
    model = llama().train()
    opened = open_model(model, tokenizer=word_tokenizer())
    assert opened.model is model
    assert model.training
    assert opened.encode("hello there")["input_ids"].tolist() == [[18, 19]]
    with pytest.raises(HeadwiseError, match="revision only apply"):
        open_model(model, revision="x")


def test_fingerprint_tells_models_apart(folder):
    one = open_model(folder)
    assert one.fingerprint == open_model(folder).fingerprint
    assert len(one.fingerprint) == 12
    other = copy.deepcopy(one.model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert open_model(other).fingerprint != one.fingerprint


def test_padding_is_left_for_decoders_and_right_for_encoders():
    batch = open_model(llama(), tokenizer=word_tokenizer()).encode(["the cat sat", "hello"])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    bert = transformers.BertModel(
        transformers.BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    batch = open_model(bert, tokenizer=word_tokenizer()).encode(["the cat sat", "hello"])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_an_encoder_decoder_gets_its_start_token():
    opened = open_model(t5(), tokenizer=word_tokenizer())
    assert opened.streams == ["encoder", "decoder", "cross"]
    assert opened.max_positions is None
    batch = opened.encode("the cat", target="a dog")
    assert batch["decoder_input_ids"].tolist() == [[3, 10, 11]]
    opened.model(**batch)
    assert opened.segments(batch).length == 2
    assert opened.segments(batch, stream="decoder").length == 3


def test_ids_and_conversations():
    opened = open_model(llama(max_position_embeddings=32), tokenizer=word_tokenizer())
    assert opened.encode(torch.tensor([5, 6]))["input_ids"].tolist() == [[5, 6]]
    assert opened.encode([5, 6])["input_ids"].tolist() == [[5, 6]]
    chat = opened.encode([{"role": "user", "content": "hello there"}])
    assert opened.decode(chat["input_ids"][0]) == "<s> user hello there </s> <s> assistant"


def test_roberta_keeps_some_positions_for_itself():
    config = transformers.RobertaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=18
    )
    assert open_model(transformers.RobertaModel(config)).max_positions == 16


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("", "empty"),
        ("  ", "empty"),
        (["hello", ""], "text 1 is empty"),
        ([], "list is empty"),
        ("the " * 17, "17 tokens, but LlamaForCausalLM has 16 positions"),
        (torch.zeros(1, 17, dtype=torch.long), "17 tokens"),
        (None, "cannot make model inputs from NoneType"),
        (np.zeros((8, 8, 3)), "no processor for image"),
        (np.zeros(8), "no processor for audio"),
    ],
)
def test_bad_input(given, word):
    opened = open_model(llama(), tokenizer=word_tokenizer())
    with pytest.raises(HeadwiseError, match=word):
        opened.encode(given)


def test_truncation_is_the_users_to_ask_for():
    opened = open_model(llama(), tokenizer=word_tokenizer())
    assert opened.encode("the " * 17, truncation=True, max_length=16)["input_ids"].shape == (1, 16)


def test_no_tokenizer():
    with pytest.raises(HeadwiseError, match="no tokenizer"):
        open_model(llama()).encode("hello")


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("zoo:dragon", "no 'zoo:dragon' in the zoo; it has zoo:llm"),
        ("/no/such/folder", "no such folder"),
        ("missing.gguf", "no such GGUF file"),
        ("not a name !", "no model 'not a name !'"),
        (3, "got int"),
    ],
)
def test_unknown_sources(source, word):
    with pytest.raises(HeadwiseError, match=word):
        open_model(source)


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HeadwiseError, match=r"could not be loaded.*fetch them again"):
        open_model(folder)
    weights.write_bytes(b"nonsense")
    with pytest.raises(HeadwiseError, match="could not be loaded"):
        open_model(folder)
    weights.unlink()
    with pytest.raises(HeadwiseError, match="could not be loaded"):
        open_model(folder)


def test_missing_attention_weights(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeadwiseError, match=r"no model\.layers\.1\.self_attn\.k_proj\.weight"):
        open_model(folder)


def test_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(HeadwiseError, match=r"config\.json could not be read"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(HeadwiseError, match=r"no config\.json"):
        open_model(folder)


def test_nan_weights(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(HeadwiseError, match=r"layers\.1\.mlp\.up_proj\.weight contain NaN"):
        open_model(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(HeadwiseError, match="contain NaN"):
        open_model(tmp_path)


def test_infinite_weights_are_not_nan():
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[:2] = torch.tensor([float("inf"), -float("inf")])
    open_model(model)


def test_no_attention():
    with pytest.raises(HeadwiseError, match="no attention layers"):
        open_model(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("content", [b"hello", b"GGUF\x03\0\0\0", b"GGUF" + bytes(200)])
def test_damaged_gguf(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(HeadwiseError, match="GGUF"):
        open_model(tmp_path / "model.gguf")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"1")
    with pytest.raises(HeadwiseError, match=r"single \.onnx"):
        open_model(tmp_path / "model.onnx")
