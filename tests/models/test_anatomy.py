"""Sites: found in every kind of model, with the sizes their attention calls really have."""

import pytest
import torch
import transformers
from torch import nn

from headwise.models import Site, attention_kind, find_sites, guess_stream

from ..families.family import batch_of, build, recorded
from ..families.table import DISPATCHING

FEW = (
    "llama qwen2 qwen3_next gpt2 gpt_neox gpt_bigcode phi3 gemma4_text deepseek_v3 jamba longcat_flash minimax bert "
    "albert modernbert t5 bart vit dinov2 swin siglip detr whisper-WhisperForConditionalGeneration "
    "musicgen_decoder-MusicgenForCausalLM wav2vec2 clip llava qwen2_vl blip-2-Blip2ForConditionalGeneration"
)
SHAPED_BY_THE_CALL = {"jetmoe", "conditional_detr"}
"""These repeat or join heads after the projections, so only the call knows."""


def cases():
    few = FEW.split()
    return [pytest.param(f, id=f.id, marks=[] if f.id in few else pytest.mark.slow) for f in DISPATCHING]


@pytest.mark.parametrize("family", cases())
def test_every_call_has_a_site_of_its_size(family):
    model = build(family)
    sites = {site.name: site for site in find_sites(model)}
    with recorded(model) as calls, torch.no_grad():
        model(**batch_of(family, model))
    assert calls
    for call in calls:
        site = sites[call.name]
        if family.name not in SHAPED_BY_THE_CALL:
            sizes = (call.query.shape[1], call.key.shape[1], call.query.shape[3], call.value.shape[3])
            assert sizes == (site.heads, site.kv_heads, site.head_dim, site.value_dim), call.name
    for stream in {site.stream for site in sites.values()}:
        layers = [site.layer for site in sites.values() if site.stream == stream]
        assert layers == list(range(len(layers)))


STREAMS = {
    "llama": ["text"],
    "bert": ["text"],
    "t5": ["encoder", "decoder", "cross"],
    "bart": ["encoder", "decoder", "cross"],
    "vit": ["vision"],
    "siglip": ["text", "vision", "pooling"],
    "clip": ["text", "vision"],
    "whisper-WhisperForConditionalGeneration": ["audio", "text", "cross"],
    "moonshine-MoonshineForConditionalGeneration": ["audio", "text", "cross"],
    "wav2vec2": ["audio"],
    "llava": ["vision", "text"],
    "qwen2_vl": ["vision", "text"],
    "blip-2-Blip2ForConditionalGeneration": ["vision", "qformer", "cross", "text"],
    "detr": ["vision", "decoder", "cross"],
}


@pytest.mark.parametrize("family", [f for f in DISPATCHING if f.id in STREAMS], ids=lambda family: family.id)
def test_streams(family):
    sites = find_sites(build(family))
    assert list(dict.fromkeys(site.stream for site in sites)) == STREAMS[family.id]
    assert all((site.kind == "cross") == (site.stream == "cross") for site in sites)


def test_what_has_no_softmax_is_no_site():
    config = transformers.MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1)
    assert find_sites(transformers.MambaModel(config)) == []
    assert find_sites(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1))) == []


def test_plain_torch():
    model = nn.Transformer(32, 4, 2, 2, 32)
    assert [(site.stream, site.kind) for site in find_sites(model)] == [
        ("encoder", "self"),
        ("encoder", "self"),
        ("decoder", "self"),
        ("cross", "cross"),
        ("decoder", "self"),
        ("cross", "cross"),
    ]


class OneHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.num_heads = 2


class Strange(nn.Module):
    """Attention that nobody would recognise."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(8, 8)


def test_a_model_of_ones_own():
    (site,) = find_sites(nn.Sequential(OneHead()))
    assert (site.stream, site.name, site.heads, site.head_dim) == ("text", "0", 2, 4)


def test_a_site_from_a_call():
    module = Strange()
    assert find_sites(module) == []
    site = Site.from_call(module, "block.strange", "text", 3, 2, 2, 4, 4, "self")
    assert (site.layer, site.heads, site.group) == (3, 2, 1)
    with pytest.raises(ValueError, match="not known"):
        _ = site.W_Q
    known = Site.from_call(OneHead(), "block", "text", 0, 2, 2, 4, 4, "self")
    assert known.W_O.shape == (2, 4, 8)


def test_kind_and_stream_by_name():
    assert attention_kind(nn.Identity(), "decoder.layers.0.encoder_attn") == "cross"
    assert attention_kind(nn.Identity(), "decoder.layers.0.self_attn") == "self"
    assert guess_stream(nn.Identity(), "model.vision_tower.layers.0.attn") == "vision"
    assert guess_stream(nn.Identity(), "model.language_model.layers.0.attn") == "text"
    assert guess_stream(nn.Identity(), "decoder.0", kind="cross") == "cross"
