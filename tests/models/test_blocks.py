"""Blocks: the layer around each attention, and the last matrix of its feed-forward part, in several architectures."""

import pytest
import torch
import transformers
from torch import nn

from headwise.errors import HeadwiseError
from headwise.models import open_model
from headwise.models.blocks import find_blocks, last_matrix, listed
from tests.models.tiny import llama, t5

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def blocks_of(model: nn.Module, stream: str = "text") -> list:
    opened = open_model(model)
    return find_blocks(model, opened.sites, stream)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20)).eval()


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=20, **SMALL)).eval()


@pytest.mark.parametrize(
    ("make", "names", "last"),
    [
        (llama, ["model.layers.0", "model.layers.1"], "mlp.down_proj"),
        (gpt2, ["transformer.h.0", "transformer.h.1"], "mlp.c_proj"),
        (bert, ["encoder.layer.0", "encoder.layer.1"], "output.dense"),
    ],
)
def test_blocks_are_the_layers_with_their_last_matrix(make, names: list[str], last: str) -> None:
    model = make()
    found = blocks_of(model)
    assert [block.name for block in found] == names
    assert [block.layer for block in found] == [0, 1]
    assert all(block.last is model.get_submodule(f"{block.name}.{last}") for block in found)
    assert all(block.site.module in set(block.module.modules()) for block in found)


def test_cross_attention_is_in_the_same_block_and_its_matrices_are_no_feed_forward() -> None:
    model = t5()
    opened = open_model(model)
    decoder = find_blocks(model, opened.sites, "decoder" if "decoder" in opened.streams else "text")
    assert [block.name for block in decoder] == ["decoder.block.0", "decoder.block.1"]
    assert all(block.last is model.get_submodule(f"{block.name}.layer.2.DenseReluDense.wo") for block in decoder)
    encoder = find_blocks(model, opened.sites, "encoder")
    assert all(block.last is model.get_submodule(f"{block.name}.layer.1.DenseReluDense.wo") for block in encoder)
    cross = find_blocks(model, opened.sites, "cross")
    assert [block.name for block in cross] == [block.name for block in decoder]


def test_a_mixture_of_experts_has_no_one_last_matrix() -> None:
    config = transformers.MixtralConfig(
        vocab_size=20, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, **SMALL
    )
    assert [block.last for block in blocks_of(transformers.MixtralForCausalLM(config).eval())] == [None, None]


def test_a_stream_that_is_not_there_is_named_with_those_that_are() -> None:
    model = llama()
    with pytest.raises(HeadwiseError, match="no stream 'vision'; this model has text"):
        find_blocks(model, open_model(model).sites, "vision")


class Flat(nn.Module):
    """Two attentions that stand in no list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(*[self.first(x, x, x)[0]] * 3)[0]


class Double(nn.Module):
    """One block with two self-attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Flat()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize(("make", "said"), [(Flat, "outside of any list"), (Double, "in one block")])
def test_models_that_are_no_list_of_layers_are_refused(make, said: str) -> None:
    model = make()
    opened = open_model(model)
    with pytest.raises(HeadwiseError, match=said):
        find_blocks(model, opened.sites, opened.streams[0])


def test_a_block_is_the_largest_item_with_one_attention() -> None:
    """Stages of blocks of sub-layers, as in Swin and T5."""
    sub = lambda: nn.Sequential(nn.Identity(), nn.Identity())  # noqa: E731
    model = nn.Module()
    model.stages = nn.ModuleList([nn.Sequential(sub(), sub()), nn.Sequential(sub())])
    parts = dict(model.named_modules())
    sites = ["stages.0.0.0", "stages.0.1.0", "stages.1.0.0"]
    assert [listed(parts, site, sites) for site in sites] == ["stages.0.0", "stages.0.1", "stages.1"]
    assert listed(parts, "stages.0.0.0", ["stages.0.0.0", "stages.0.0.1"]) == "stages.0.0.0"
    assert listed(dict(llama().named_modules()), "lm_head", ["lm_head"]) is None


def test_a_block_of_attention_only_has_no_last_matrix() -> None:
    model = llama()
    site = open_model(model).sites[0]
    assert last_matrix(site.module, site) is None
