"""A token of decoding on the CPU: biases and gains as rows made once, against the dense path."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import headwise as hw
from headwise.attention import force_path

IDS = torch.randint(3, 99, (2, 14), generator=torch.Generator().manual_seed(0))
PAD = torch.tensor([[0, 0, 0, *[1] * 11], [1] * 14])
NAMES = ("a", "b", "rest", "generated")
ONE = hw.Segments(NAMES, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
EACH = hw.Segments(NAMES, torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1, 1]]))
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


EDITS = {
    "bias": [hw.ScoreBias(1.5, keys="a")],
    "bias of some heads": [hw.ScoreBias(1.5, keys="b", heads=[0, 3]), hw.ScoreBias(-2.0, keys="generated", layer=1)],
    "knockout": [hw.ScoreBias(-math.inf, keys="b", heads=[(0, 1), (1, 2)])],
    "bias of queries": [hw.ScoreBias(2.0, keys="a", queries="generated"), hw.ScoreBias(3.0, keys="a", queries="b")],
    "first token": [hw.ScoreBias(2.0, keys="first"), hw.ScoreBias(9.0, keys="a", queries="first")],
    "vector": [hw.ScoreBias(0.5, keys=torch.arange(7.0)), hw.ScoreBias(1.0)],
    "bools": [hw.ScoreBias(-math.inf, keys=torch.arange(8) % 3 == 0), hw.ScoreBias(2.0, keys=torch.arange(6) > 2)],
    "gain": [hw.HeadGain(gain=0.5, heads=[1]), hw.HeadGain(gain=3.0, heads=[1, 2]), hw.HeadGain(gain=0.0, layer=1)],
    "gain of some tokens": [hw.HeadGain(gain=0.1, tokens="generated"), hw.HeadGain(gain=7.0, tokens="a")],
    "both": [hw.HeadGain(gain=0.5, heads=[1]), hw.ScoreBias(1.5, keys="a")],
    "none": [],
}  # fmt: skip


def decode(model: nn.Module, edits: list, segments: hw.Segments, path: str | None, **kw: object) -> tuple:
    """Logits of five tokens after a prompt of nine, and what explain() says then."""
    with torch.no_grad(), force_path(path) if path else nullcontext():
        with hw.attend(model, edits=edits, segments=segments) as run:
            asked = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "eos_token_id": None}
            out = model.generate(IDS[:, :9], max_new_tokens=5, pad_token_id=0, **asked, **kw)
        return out.sequences, torch.stack(out.logits), run.explain()


@pytest.mark.parametrize("segments", [ONE, EACH], ids=["one for all", "each its own"])
@pytest.mark.parametrize("name", EDITS)
def test_a_step_is_the_dense_path(llama: LlamaForCausalLM, name: str, segments: hw.Segments) -> None:
    padded = {"attention_mask": PAD[:, :9]}
    for kw in ({}, padded, {"cache_implementation": "static"}, {"cache_implementation": "static", **padded}):
        ids, expected, _ = decode(llama, EDITS[name], segments, "dense", **kw)
        found, logits, how = decode(llama, EDITS[name], segments, None, **kw)
        assert torch.equal(found, ids)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        assert "library: one token at a time" in how or (name == "none" and "only the output" in how)


@pytest.mark.parametrize("name", ["bias", "both", "none"])
def test_sliding_windows(name: str) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()
    for kw in ({}, {"attention_mask": PAD[:, :9]}):
        ids, expected, _ = decode(model, EDITS[name], ONE, "dense", **kw)
        found, logits, how = decode(model, EDITS[name], ONE, None, **kw)
        assert torch.equal(found, ids)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        assert "one token at a time" in how or name == "none"


def test_every_forward_has_its_own_row(llama: LlamaForCausalLM) -> None:
    """Two texts in turn that grow apart, and a run that comes and goes."""
    edit = hw.ScoreBias(2.0, keys="a")

    def texts(path: str | None) -> list[torch.Tensor]:
        found = []
        way = force_path(path) if path else nullcontext()
        with torch.no_grad(), way, hw.attend(llama, edits=[edit], segments=ONE):
            one, two = (llama(ids[:, :9], use_cache=True).past_key_values for ids in (IDS, IDS.flip(1)))
            for n in range(3):
                found.append(llama(IDS[:, n : n + 1], past_key_values=one).logits)
                found.append(llama(IDS[:, n : n + 1], past_key_values=two).logits)
                with hw.attend(llama, edits=[hw.HeadGain(gain=0.3, heads=[n])]):
                    found.append(llama(IDS[:, :1], past_key_values=one).logits)
        return found

    for found, expected in zip(texts(None), texts("dense"), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_what_a_row_cannot_say_goes_the_general_way(llama: LlamaForCausalLM) -> None:
    for edit in (
        hw.ScoreBias(2.0, keys="previous"),
        hw.ScoreBias(2.0, keys=torch.ones(2, 9) > 0),
        hw.HeadGain(gain="mean"),
        hw.ScoreMap(torch.sin),
        hw.Blend(0.5),
    ):
        _, expected, _ = decode(llama, [edit], ONE, "dense")
        _, logits, how = decode(llama, [edit], ONE, None)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        assert "one token at a time" not in how
