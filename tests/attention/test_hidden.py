"""The residual stream: what is seen is what the model's own outputs say, what is changed is changed, and all is left as
it was, also after an exception."""

import pytest
import torch
import transformers
from torch import nn

from headwise.attention import attend
from headwise.attention.hidden import PLACES, chosen_blocks, hidden, incoming, record
from headwise.attention.readings import Entropy
from headwise.errors import HeadwiseError
from headwise.models import Opened, open_model
from tests.models.tiny import llama, t5

IDS = torch.tensor([[5, 7, 9, 11, 13], [6, 8, 10, 12, 14]])


def opened_llama() -> Opened:
    return open_model(llama())


def logits(opened: Opened) -> torch.Tensor:
    with torch.no_grad():
        return opened.model(input_ids=IDS).logits


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_blocks_hold_the_hidden_states_of_the_model() -> None:
    opened = opened_llama()
    seen = record(opened, {"input_ids": IDS}, ("block_in", "block_out"))
    with torch.no_grad():
        states = opened.model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert seen["block_in"].shape == (2, 2, 5, 32)
    assert torch.equal(seen["block_in"][0], states[0])
    assert torch.equal(seen["block_in"][1], seen["block_out"][0])
    assert torch.equal(seen["block_out"][0], states[1])


def test_a_block_adds_what_its_attention_and_its_feed_forward_part_write() -> None:
    opened = opened_llama()
    seen = record(opened, {"input_ids": IDS}, PLACES)
    total = seen["block_in"] + seen["attention_out"] + seen["mlp_out"]
    torch.testing.assert_close(total, seen["block_out"])
    down = torch.stack([layer.mlp.down_proj.weight for layer in opened.model.model.layers]).detach()
    torch.testing.assert_close(torch.einsum("lbtf,ldf->lbtd", seen["mlp_hidden"], down), seen["mlp_out"])


def test_chosen_layers_only() -> None:
    seen = record(opened_llama(), {"input_ids": IDS}, ("mlp_out",), layers=[1])
    assert torch.equal(seen["mlp_out"][0], record(opened_llama(), {"input_ids": IDS}, ("mlp_out",))["mlp_out"][1])


@pytest.mark.parametrize("place", PLACES)
def test_looking_changes_nothing_and_leaves_no_hook(place: str) -> None:
    opened = opened_llama()
    before, count = logits(opened), hooks(opened.model)
    calls = []
    with hidden(opened, {place: lambda layer, x: calls.append((layer, tuple(x.shape[:2])))}):
        assert torch.equal(logits(opened), before)
    assert calls == [(0, (2, 5)), (1, (2, 5))]
    assert torch.equal(logits(opened), before)
    assert hooks(opened.model) == count


@pytest.mark.parametrize("place", PLACES)
def test_what_a_look_returns_takes_its_place(place: str) -> None:
    opened = opened_llama()
    before = logits(opened)
    with hidden(opened, {place: lambda layer, x: x.clone()}):
        assert torch.equal(logits(opened), before), "the same numbers give the same output"
    with hidden(opened, {place: lambda layer, x: torch.zeros_like(x)}, layers=[1]):
        changed = logits(opened)
    assert not torch.equal(changed, before)
    assert torch.equal(logits(opened), before)


def test_a_feed_forward_part_without_features_writes_nothing() -> None:
    opened = opened_llama()
    empty = {"mlp_hidden": lambda layer, x: torch.zeros_like(x)}
    silent = {"mlp_out": lambda layer, x: torch.zeros_like(x)}
    with hidden(opened, empty):
        one = logits(opened)
    with hidden(opened, silent):
        other = logits(opened)
    torch.testing.assert_close(one, other)


def test_a_block_that_gives_back_what_it_got_is_skipped() -> None:
    opened = opened_llama()
    kept = {}
    with hidden(
        opened,
        {"block_in": lambda layer, x: kept.update({layer: x}), "block_out": lambda layer, x: kept[layer]},
        layers=[1],
    ):
        skipped = logits(opened)
    del opened.model.model.layers[1]
    torch.testing.assert_close(skipped, logits(opened))


def test_an_exception_leaves_the_model_bit_for_bit() -> None:
    opened = opened_llama()
    before, count = logits(opened), hooks(opened.model)

    def fail(layer: int, x: torch.Tensor) -> torch.Tensor:
        if layer == 1:
            raise RuntimeError("in the middle")
        return x * 2

    with pytest.raises(RuntimeError, match="in the middle"), hidden(opened, {"block_out": fail, "mlp_out": fail}):
        logits(opened)
    assert torch.equal(logits(opened), before)
    assert hooks(opened.model) == count


def test_a_place_that_a_later_block_lacks_leaves_no_hook_on_the_earlier() -> None:
    opened = opened_llama()
    last = opened.model.model.layers[1]
    last.mlp = nn.Identity()
    count = hooks(opened.model)
    with (
        pytest.raises(HeadwiseError, match=r"mlp_out: model\.layers\.1 .* no one matrix"),
        hidden(opened, {"mlp_out": lambda layer, x: None}),
    ):
        pass
    assert hooks(opened.model) == count


def test_blocks_inside_blocks_and_attend_beside() -> None:
    opened = opened_llama()
    order = []
    with (
        hidden(opened, {"block_out": lambda layer, x: order.append(("outer", layer))}),
        attend(opened, readings=[Entropy()]) as run,
        hidden(opened, {"block_out": lambda layer, x: order.append(("inner", layer))}),
    ):
        logits(opened)
    assert order == [("outer", 0), ("inner", 0), ("outer", 1), ("inner", 1)]
    assert run.tree["text"]["entropy"].notnull().all()


def test_recording_keeps_copies() -> None:
    opened = opened_llama()
    seen = record(opened, {"input_ids": IDS}, ("mlp_out",))["mlp_out"]
    again = record(opened, {"input_ids": IDS}, ("mlp_out",))["mlp_out"]
    seen.zero_()
    assert again.abs().sum() > 0
    assert not again.requires_grad


def test_streams_of_an_encoder_and_a_decoder() -> None:
    opened = open_model(t5())
    decoder = "decoder" if "decoder" in opened.streams else "text"
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    lengths = {s: record(opened, batch, stream=s)["block_out"].shape[2] for s in ("encoder", decoder)}
    assert lengths == {"encoder": 5, decoder: 3}


def test_a_picture_model_gives_its_first_stream() -> None:
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    opened = open_model(transformers.Dinov2Model(config).eval())
    seen = record(opened, {"pixel_values": torch.randn(1, 3, 28, 28)}, ("block_out",))
    assert seen["block_out"].shape == (2, 1, 5, 12)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"looks": {}}, "looks: wanted some of the places"),
        ({"looks": {"block_middle": lambda layer, x: None}}, r"got \['block_middle'\]"),
        ({"looks": {"block_in": lambda layer, x: None}, "layers": [0, 7]}, r"layers 0 to 1; got \[7\]"),
        ({"looks": {"block_in": lambda layer, x: None}, "stream": "audio"}, "no stream 'audio'; this model has text"),
    ],
)
def test_mistakes_are_named(given: dict, said: str) -> None:
    with pytest.raises(HeadwiseError, match=said), hidden(opened_llama(), **given):
        pass


def test_no_layers_chosen_is_no_layer() -> None:
    assert chosen_blocks(opened_llama(), [], None) == []


def test_what_a_module_is_given_is_its_first_tensor_of_numbers() -> None:
    x = torch.ones(1, 2, 3)
    module = nn.Identity()
    assert incoming(module, (x,), {}) == (None, x)
    assert incoming(module, (), {"position_ids": torch.tensor([[0, 1]]), "hidden_states": x})[0] == "hidden_states"
    with pytest.raises(HeadwiseError, match="Identity was called without a tensor"):
        incoming(module, (None,), {"scale": 2.0})
