"""LayerNorm in halves, and in the place of a model's norms."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F

from headwise import swap
from headwise.errors import HeadwiseError
from headwise.study.swap_factorized_norm import factorized_norm_training
from tests.models.tiny import llama

IDS = torch.tensor([[1, 5, 6, 7, 8, 9]])


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def gemma() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=32, head_dim=8, pad_token_id=3,
    )  # fmt: skip
    model = transformers.GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.normal_()
    return model


def test_the_halves_of_layer_norm():
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = swap.FactorizedLayerNorm(8, affine=False)(x)
    torch.testing.assert_close(both, F.layer_norm(x, (8,), eps=0))
    torch.testing.assert_close(both.sum(-1), torch.zeros(5).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(both.norm(dim=-1), torch.full((5,), 8**0.5).double())
    torch.testing.assert_close(swap.FactorizedLayerNorm(8, project=False, affine=False)(x), F.rms_norm(x, (8,), eps=0))
    torch.testing.assert_close(swap.FactorizedLayerNorm(8, False, False).double()(x), x)


@pytest.mark.parametrize("make,project", [(gpt2, True), (llama, False), (gemma, False)])
def test_a_norm_replaced_by_its_like_changes_nothing(make, project):
    model = make()
    with torch.no_grad():
        plain = model(IDS).logits
        old = swap.replace_norm(model, project=project)
        assert len(old) == 2
        torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=2e-5)
        for name, norm in old.items():
            model.set_submodule(name, norm)
        assert torch.equal(model(IDS).logits, plain)
        swap.replace_norm(model, project=project, scale=False)
        assert not torch.allclose(model(IDS).logits, plain, atol=1e-3)


def test_other_norms_by_name():
    model = gpt2()
    assert set(swap.replace_norm(model, r"ln_f$", affine=False)) == {"transformer.ln_f"}
    assert not list(model.transformer.ln_f.parameters())


@pytest.mark.parametrize("which,said", [("nowhere", "nothing"), (r"lm_head$", "lm_head")])
def test_what_is_no_norm_is_refused(which: str, said: str):
    with pytest.raises(HeadwiseError, match=rf"finds norms in LlamaForCausalLM; .* finds {said}"):
        swap.replace_norm(llama(), which)


def test_the_study_runs():
    found = factorized_norm_training(seeds=(0,), steps=2, layers=1, length=24, tokens=24)
    assert found.verdict in ("holds", "fails")
    assert set(found.measured["nats"]) == {"both", "project", "scale", "neither"}
    assert found.measured["unselectable"]["both"] == [[0.0]]
