"""Conversion of many hosts: equal at the start, or refused; called, masked and cached as each of them does it."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from headwise import swap
from headwise.attention import Mass, attend
from headwise.errors import HeadwiseError

SIZES = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32, pad_token_id=0,
    bos_token_id=1, eos_token_id=None,
)  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
LATENT = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, pad_token_id=0,
    decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, bos_token_id=1, eos_token_id=None,
    decoder_start_token_id=1,
)  # fmt: skip
IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0


def made(name: str, config: t.PreTrainedConfig) -> t.PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(t, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform attention, which would hide much
            parameter.mul_(3)
    return model


def mistral() -> t.PreTrainedModel:
    return made("MistralForCausalLM", t.MistralConfig(**GROUPED, sliding_window=4))


def out(model, *args, **given) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **given)[0]


@pytest.mark.parametrize(
    "name,config",
    [
        ("SmolLM3ForCausalLM", t.SmolLM3Config(**GROUPED)),  # every fourth layer turns nothing
        ("Cohere2ForCausalLM", t.Cohere2Config(**GROUPED, sliding_window=4)),  # nor does this one's
        ("PhiForCausalLM", t.PhiConfig(**SIZES, partial_rotary_factor=0.5)),  # turns a part of each head
        ("GPTNeoXForCausalLM", t.GPTNeoXConfig(**SIZES)),  # so does this, in its function
        ("MistralForCausalLM", t.MistralConfig(**GROUPED, sliding_window=4)),
        ("Gemma3ForCausalLM", t.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4)),
    ],
)
def test_equal_at_the_start(name, config):
    model = made(name, config)
    plain, padded = out(model, IDS), out(model, IDS, attention_mask=PADDED)
    with swap.convert(model, "attention"):
        torch.testing.assert_close(out(model, IDS), plain, rtol=0, atol=1e-4)
        again = out(model, IDS, attention_mask=PADDED)
    torch.testing.assert_close(again[PADDED.bool()], padded[PADDED.bool()], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name,config",
    [
        ("Olmo2ForCausalLM", t.Olmo2Config(**GROUPED)),  # norms all heads together
        ("OlmoForCausalLM", t.OlmoConfig(**GROUPED, clip_qkv=0.1)),
        ("StableLmForCausalLM", t.StableLmConfig(**GROUPED, qk_layernorm=True)),
        ("CohereForCausalLM", t.CohereConfig(**GROUPED, use_qk_norm=True)),
        ("UMT5EncoderModel", t.UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)),
        ("EsmModel", t.EsmConfig(**SIZES, position_embedding_type="rotary")),
    ],
)
def test_refused_where_weights_are_not_all(name, config):
    model = made(name, config)
    with pytest.raises(HeadwiseError, match="can't be replaced: attention by its weights alone"):
        swap.convert(model, "attention")
    assert not any(isinstance(module, swap.Mechanism) for module in model.modules())


def test_a_host_that_hands_over_by_place():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    model = made("ViTModel", t.ViTConfig(**sizes, image_size=8, patch_size=2))
    pixels = torch.randn(2, 3, 8, 8)
    plain = out(model, pixels)
    with swap.convert(model, "attention"), attend(model, [Mass(("first",))]) as run:
        torch.testing.assert_close(out(model, pixels), plain, rtol=0, atol=1e-5)
    assert run.tree


def test_causal_by_the_call():
    config = t.CLIPTextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, eos_token_id=2
    )
    model = made("CLIPTextModel", config)
    plain = out(model, IDS)
    with (
        swap.convert(model, "attention"),
        pytest.raises(HeadwiseError, match=r"layers\.0\.self_attn: the host asks for causal.*with causal=True"),
    ):
        out(model, IDS)
    with swap.convert(model, "attention", causal=True):
        torch.testing.assert_close(out(model, IDS), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layers", [None, [0], [2]])
def test_windows_while_generating(layers, padded):
    model, given = mistral(), {"max_new_tokens": 8, "do_sample": False}
    if padded:
        given["attention_mask"] = PADDED
    plain, beams = model.generate(IDS, **given), model.generate(IDS, num_beams=2, **given)
    with swap.convert(model, "attention", layers=layers):
        assert torch.equal(model.generate(IDS, **given), plain)
        assert torch.equal(model.generate(IDS, num_beams=2, **given), beams)
        with attend(model, [Mass(("first",))]):
            assert torch.equal(model.generate(IDS, **given), plain)


def test_a_window_is_seen_where_the_mask_is_the_kernels_business():
    model = mistral()
    plain = out(model, IDS, attention_mask=PADDED)
    with swap.convert(model, "attention"):
        model.config._attn_implementation = "flash_attention_2"  # its masks are padding alone
        torch.testing.assert_close(
            out(model, IDS, attention_mask=PADDED)[PADDED.bool()], plain[PADDED.bool()], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_masks_of_other_kernels(implementation):
    model, given = mistral(), {"max_new_tokens": 8, "do_sample": False, "attention_mask": PADDED}
    plain = model.generate(IDS, **given)
    with swap.convert(model, "attention"):
        model.set_attn_implementation(implementation)
        assert torch.equal(model.generate(IDS, **given), plain)


@pytest.mark.parametrize("name", ["Bart", "Whisper"])
def test_decoders_of_two_caches(name):
    if name == "Bart":
        model, first = made("BartForConditionalGeneration", t.BartConfig(**LATENT)), IDS
    else:
        config = t.WhisperConfig(**LATENT, num_mel_bins=8, max_source_positions=16, max_target_positions=32)
        model, first = made("WhisperForConditionalGeneration", config), torch.randn(2, 8, 32)
    given = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(first, **given)
    with swap.convert(model, "attention") as conversion:
        assert len(conversion.mechanisms) == 2
        assert torch.equal(model.generate(first, **given), plain)


def test_a_cache_that_keeps_more_is_refused():
    config = t.FalconH1Config(
        **GROUPED, head_dim=8, mamba_d_state=8, mamba_d_head=16, mamba_n_heads=4, mamba_chunk_size=8, mamba_d_ssm=64
    )
    model = made("FalconH1ForCausalLM", config)
    plain = out(model, IDS, use_cache=False)
    with swap.convert(model, "attention"):
        torch.testing.assert_close(out(model, IDS, use_cache=False), plain, rtol=0, atol=1e-3)
        with pytest.raises(HeadwiseError, match=r"keeps more than keys and values of this layer.*use_cache=False"):
            out(model, IDS, use_cache=True)
