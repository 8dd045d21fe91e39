"""Feature entropy and transfer entropy against a slow reference and their limits."""

import math

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from headwise import scan
from headwise.attention.hidden import record
from headwise.errors import HeadwiseError
from headwise.models import open_model
from headwise.scan.entropies import FeatureEntropy, final_features, gaussian_entropy, transfer_entropy
from headwise.scan.needles import haystack
from tests.scan.models import bert, circuit, llama

TEXTS = [haystack()[:300], haystack()[2000:2500]]


def dinov2():
    """Pre-norm blocks with a layer scale."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14, layerscale_value=0.3
    )
    return open_model(Dinov2Model(config).eval())


def pictures(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(1, 3, 28, 28, generator=generator)} for _ in range(count)]


def test_entropy_of_scaled_features_moves_by_the_log_of_the_scale() -> None:
    x = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)).double()
    x[:, 2] = 1e3 + 1e-3 * x[:, 2]
    assert gaussian_entropy(x) == pytest.approx(float(x.std(0, correction=0).log().sum()), abs=1e-3)
    assert gaussian_entropy(3 * x) - gaussian_entropy(x) == pytest.approx(7 * math.log(3), abs=1e-3)


def test_a_constant_channel_enters_clamped() -> None:
    x = torch.tensor([[5.0, 1.0], [5.0, 3.0]])
    assert gaussian_entropy(x) == pytest.approx(math.log(1e-12) + math.log(1.0))
    with pytest.raises(HeadwiseError, match="at least 2 samples"):
        gaussian_entropy(x[:1])


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("tokens", ["all", "first"])
def test_the_question_equals_the_entropy_of_recorded_features(make, tokens) -> None:
    opened = make()
    data = scan.heads(opened, texts=TEXTS, questions=[FeatureEntropy(tokens=tokens)]).data.sel(stream="text")
    places = ("attention_out", "mlp_out", "block_out")
    seen = [record(opened, opened.encode(text), places) for text in TEXTS]
    for place in places:
        rows = [x[place][:, 0] if tokens == "all" else x[place][:, 0, :1] for x in seen]
        features = torch.cat(rows, dim=1)
        found = data["feature_entropy_layer"].sel(place=place)
        np.testing.assert_allclose(found, [gaussian_entropy(layer) for layer in features], rtol=1e-4, atol=1e-3)


def test_the_score_of_a_head_is_the_entropy_of_what_it_hands_on() -> None:
    opened = llama()
    handed = {}
    for site in opened.sites:
        site.out.register_forward_pre_hook(
            lambda _, args, layer=site.layer: handed.setdefault(layer, []).append(args[0])
        )
    inputs = [opened.encode(text) for text in TEXTS]
    for batch in inputs:
        with torch.no_grad():
            opened.model(**batch)
    wanted = [
        [gaussian_entropy(z) for z in torch.cat([x[0] for x in handed[layer]]).unflatten(-1, (4, -1)).unbind(1)]
        for layer in (0, 1)
    ]
    found = scan.heads(opened, inputs=inputs, questions=[FeatureEntropy()]).data["feature_entropy"].sel(stream="text")
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_padding_is_no_sample() -> None:
    opened = llama()
    one = opened.encode(TEXTS[0])
    padded = {
        "input_ids": torch.nn.functional.pad(one["input_ids"], (0, 5), value=7),
        "attention_mask": torch.nn.functional.pad(one["attention_mask"], (0, 5), value=0),
    }
    a, b = (scan.heads(opened, inputs=x, questions=[FeatureEntropy()]).data for x in (one, padded))
    np.testing.assert_allclose(a["feature_entropy"], b["feature_entropy"], rtol=1e-4)
    np.testing.assert_allclose(a["feature_entropy_layer"], b["feature_entropy_layer"], rtol=1e-4)


def test_the_identity_adds_the_blocks_input_once_more_whatever_scales_the_branch() -> None:
    opened, inputs = dinov2(), pictures(4)
    found = final_features(opened, inputs, removed=[1])
    rows = []
    for batch in inputs:
        with torch.no_grad():
            x = opened.model.embeddings(batch["pixel_values"])
            for number, layer in enumerate(opened.model.encoder.layer):
                branch = x if number == 1 else layer.layer_scale1(layer.attention(layer.norm1(x))[0])
                x = x + branch
                x = x + layer.layer_scale2(layer.mlp(layer.norm2(x)))
        rows.append(torch.nn.functional.layer_norm(x[:, 0], x.shape[-1:]))
    torch.testing.assert_close(found, torch.cat(rows), atol=1e-5, rtol=1e-4)


def test_transfer_entropy_is_the_distance_of_two_entropies_and_never_negative() -> None:
    opened, inputs = dinov2(), pictures(6)
    found = transfer_entropy(opened, inputs, removed=[0])
    assert np.isnan(found.sel(layer=0))
    before = gaussian_entropy(final_features(opened, inputs, [0]))
    for layer in (1, 2):
        after = gaussian_entropy(final_features(opened, inputs, [0, layer]))
        assert float(found.sel(layer=layer)) == pytest.approx(abs(after - before))
    assert (found.dropna("layer") > 0).all()


def test_an_attention_that_writes_its_blocks_input_already_transfers_nothing() -> None:
    opened = llama()
    block = opened.model.model.layers[1]
    entered = []
    block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    block.self_attn.o_proj.register_forward_hook(lambda *_: entered[-1])
    found = transfer_entropy(opened, [opened.encode(text) for text in TEXTS], tokens="all")
    assert float(found.sel(layer=1)) < 1e-4 < float(found.sel(layer=0))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(HeadwiseError, match="'last'"):
        FeatureEntropy(tokens="last")
    with pytest.raises(HeadwiseError, match=r"layers 0 to 2; got \[3\]"):
        transfer_entropy(dinov2(), pictures(2), removed=[3])
    with pytest.raises(HeadwiseError, match="at least 2 samples"):
        scan.heads(llama(), texts=TEXTS[0], questions=[FeatureEntropy(tokens="first")])
    assert FeatureEntropy().lacks(circuit()) == "blocks with one output matrix of attention and one last matrix each"
