"""Per-head weights: equal to what the layers compute, and cut at the right heads for every layout."""

import pytest
import torch
import transformers
from torch import nn

from headwise.errors import HeadwiseError
from headwise.models import find_sites

from ..families.family import batch_of, build, tensors
from ..families.table import DISPATCHING, FALLBACK, FUNCTION_MODE, HAND_WRITTEN
from .knockout import gaps
from .tiny import llama

FEW = (
    "llama qwen2 gpt2 gpt_neox gpt_bigcode persimmon phi3 starcoder2 dbrx qwen3_next bert modernbert bart t5 vit "
    "dinov2 beit whisper-WhisperForConditionalGeneration clip qwen2_vl falcon bloom mpt codegen imagegpt-ImageGPTModel "
    "gpt_neox_japanese deberta openai-gpt"
)
WHOLE_WIDTH_NORM = {"olmo2", "olmo3", "olmoe", "flex_olmo", "olmo_hybrid", "minimax_m2"}
"""A norm over all heads together: silencing one head's queries changes the others'."""
UNLIKE = {
    **{name: {"key", "query"} for name in WHOLE_WIDTH_NORM},
    "persimmon": {"key"},  # the norm of the queries has a bias
    "sam_vision_model": {"key"},  # the queries meet the relative positions as well as the keys
    "funnel": {"key"},
    "deberta": {"key"},
    "deberta-v2": {"key"},
    "bitnet": {"value", "query"},  # a norm between the heads and the output
    "doge": {"value"},  # the values decide which keys are seen
    "gemma4_text": {"value", "key"},  # later layers take these keys and values too
    "gemma3n_text": {"value", "key"},
    "diffusers SD3": {"value", "key"},  # text joins with projections of its own
    "detr": {"change"},  # the decoder's queries start as zeros
}
REFUSED = (
    "jetmoe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe_lite youtu minicpm3 longcat_flash axk1 "
    "glm_moe_dsa kimi_linear conditional_detr xlnet convbert squeezebert diffllama"
)
"""Latent attention, convolutions, experts, and heads that are mixed: no single head owns a matrix there."""


def cases():
    few = {*FEW.split(), *(family.id for family in FALLBACK)}
    families = [*DISPATCHING, *FUNCTION_MODE, *HAND_WRITTEN, *FALLBACK]
    return [pytest.param(f, id=f.id, marks=[] if f.id in few else pytest.mark.slow) for f in families]


def refuses(site):
    try:
        _ = site.W_Q, site.W_K, site.W_V, site.W_O
    except HeadwiseError:
        return True
    return False


@pytest.mark.parametrize("family", cases())
def test_knocking_out(family):
    """The identities of `knockout.py`, at the first layer of every stream."""
    if family in FALLBACK:
        model, batch = family.build(), family.batch()
    else:
        model = build(family)
        batch = batch_of(family, model)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])

    def run():
        torch.manual_seed(0)
        with torch.no_grad():
            return tensors(model(**batch))

    excused = UNLIKE.get(family.name, set())
    sites = [site for site in find_sites(model) if site.layer == 0]
    assert any(refuses(site) for site in sites) is (family.name in REFUSED.split())
    for site in sites:
        if refuses(site):
            continue
        found = gaps(site, run, model)
        assert found.pop("change") > 1e-3 or "change" in excused, site.name
        for identity, gap in found.items():
            assert gap < 1e-3 or identity in excused, (site.name, identity, gap)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_projections_are_reproduced(bias):
    """q, k, v and the output of a grouped-query layer, from the weights of single heads."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=bias,
    )  # fmt: skip
    model = transformers.LlamaModel(config)
    for parameter in model.parameters():
        parameter.normal_()
    (site,) = find_sites(model)
    x = torch.randn(5, 32)
    for linear, weight, b in (
        (site.module.q_proj, site.W_Q, site.b_Q),
        (site.module.k_proj, site.W_K, site.b_K),
        (site.module.v_proj, site.W_V, site.b_V),
    ):
        heads = torch.einsum("td,hde->the", x, weight)
        heads = heads if b is None else heads + b
        torch.testing.assert_close(heads.flatten(1), linear(x))
    z = torch.randn(5, 4, 8)
    out = torch.einsum("the,hed->td", z, site.W_O)
    torch.testing.assert_close(out if site.b_O is None else out + site.b_O, site.module.o_proj(z.flatten(1)))
    assert (site.b_Q is None) is not bias


def test_weights_are_views():
    model = llama()
    site = find_sites(model)[0]
    with torch.no_grad():
        site.W_V[1].zero_()
    assert not site.module.v_proj.weight[8:16].any()
    assert site.module.v_proj.weight[:8].any()


@torch.no_grad()
def test_torch_mha_with_keys_of_another_width():
    module = nn.MultiheadAttention(32, 4, kdim=16, vdim=8, batch_first=True)
    (site,) = find_sites(nn.ModuleList([module]))
    assert site.W_K.shape == (4, 16, 8)
    q, k, v = torch.randn(1, 3, 32), torch.randn(1, 5, 16), torch.randn(1, 5, 8)
    qh, kh, vh = (
        torch.einsum("btd,hde->bhte", x, w) + b[:, None]
        for x, w, b in ((q, site.W_Q, site.b_Q), (k, site.W_K, site.b_K), (v, site.W_V, site.b_V))
    )
    z = torch.softmax(qh @ kh.mT / 8**0.5, -1) @ vh
    mine = torch.einsum("bhte,hed->btd", z, site.W_O) + site.b_O
    torch.testing.assert_close(mine, module(q, k, v, need_weights=False)[0])


class Custom(nn.Module):
    """A fused projection whose order of rows nobody can know."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)


def test_an_unknown_fused_layout_is_refused():
    (site,) = find_sites(nn.Sequential(Custom()))
    assert (site.heads, site.kv_heads, site.head_dim) == (2, 2, 4)
    with pytest.raises(HeadwiseError, match="layout of its projections is not known"):
        _ = site.W_Q
    assert site.W_O.shape == (2, 4, 8)


def test_an_adapter_is_refused():
    model = llama()
    site = find_sites(model)[0]
    adapter = nn.Module()
    adapter.base_layer = site.module.q_proj
    site.module.q_proj = adapter
    assert len(find_sites(model)) == 2
    with pytest.raises(HeadwiseError, match="unmerged adapter"):
        _ = site.W_Q
