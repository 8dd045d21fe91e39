"""The attention basin: spans of documents, and the profile of attention that is known."""

import numpy as np
import pytest
import torch
import xarray as xr

from headwise import scan
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from headwise.scan.basin import AttentionBasin, basin_layer, edge_ratio
from tests.scan.models import bert, llama

SMALL = AttentionBasin(slots=4, shuffles=3)


def profile(*rows: list[float]) -> xr.DataArray:
    return xr.DataArray(np.array(rows), dims=("layer", "slot"), coords={"layer": range(len(rows))})


def test_the_edge_ratio_and_the_first_layer_with_a_basin() -> None:
    flat, rising, basin = [1.0] * 4, [0.5, 1, 1, 4], [3.0, 1, 1, 2]
    layers = profile(flat, rising, basin)
    np.testing.assert_allclose(edge_ratio(layers), [1, 2.25, 2.5])
    assert basin_layer(layers) == 2, "a high edge on one side only is no basin"
    assert basin_layer(profile(flat, rising)) is None


def test_documents_hold_their_own_tokens_and_every_slot_is_asked_for() -> None:
    opened = llama()
    question = AttentionBasin(slots=4, shuffles=4)
    prompts = question.prompts(opened)
    assert sorted(p.own.gold for p in prompts) == [0, 1, 2, 3]
    for prompt in prompts:
        segments, ids = prompt.segments["text"], prompt.inputs["input_ids"][0]
        for number, text in enumerate(prompt.own.documents, 1):
            words = opened.decode(ids[segments.mask(f"document {number}")])
            assert words == opened.decode(opened.tokenizer(f"Document {number}: {text}")["input_ids"])
        asked = opened.decode(ids[segments.mask("request")])
        assert asked == opened.decode(opened.tokenizer(prompt.own.request)["input_ids"])
        assert prompt.own.answer in prompt.own.documents[prompt.own.gold]


def test_the_profile_is_that_of_the_whole_matrix() -> None:
    opened = llama()
    result = scan.heads(opened, questions=[SMALL])
    slow = []
    for prompt in SMALL.prompts(opened):
        with attend(opened, readings=[Map()]) as run, torch.no_grad():
            opened.model(**prompt.inputs)
        weights = run.tree["text"]["map"].isel(sample=0).transpose("layer", "head", "query", "key").values
        segments = prompt.segments["text"]
        rows = weights[:, :, segments.mask("request").numpy()]
        slow.append([rows[..., segments.mask(f"document {n}").numpy()].sum(-1).mean(-1) for n in range(1, 5)])
    lengths = [int(segments.mask(f"document {n}").sum()) for n in range(1, 5)]
    assert len(set(lengths)) == 1, "one word a token: all facts are as long"
    expected = np.moveaxis(np.mean(slow, 0), 0, -1) / lengths[0]
    np.testing.assert_allclose(result.data["basin_heads"].sel(stream="text"), expected, rtol=1e-4)
    np.testing.assert_allclose(result.data["basin_profile"].sel(stream="text"), expected.mean(1), rtol=1e-4)
    ratio = expected[..., [0, 3]].mean(-1) / expected[..., [1, 2]].mean(-1)
    np.testing.assert_allclose(result.heads["attention_basin"], ratio.ravel(), rtol=1e-4)


def test_uniform_attention_has_an_edge_ratio_of_one_and_masses_below_one() -> None:
    opened = llama()
    for site in opened.sites:
        site.module.q_proj.weight.data.zero_()
    result = scan.heads(opened, questions=[SMALL])
    np.testing.assert_allclose(result.heads["attention_basin"], 1, rtol=1e-5)
    masses = scan.heads(opened, questions=[AttentionBasin(slots=4, shuffles=1, normalise="none")])
    total = masses.data["basin_heads"].sum("slot")
    assert float(total.max()) < 1
    assert float(total.min()) > 0.3


def test_your_own_documents_are_shuffled() -> None:
    own = AttentionBasin(
        documents=("One is red.", "Two is blue.", "Three is green."), request="Which is red?", shuffles=6
    )
    orders = {own.shelf(seed).documents for seed in range(6)}
    assert len(orders) > 1
    assert all(sorted(order) == sorted(own.documents) for order in orders)
    found = scan.heads(llama(), questions=[own])
    assert found.data["basin_profile"]["slot"].values.tolist() == [1, 2, 3]


def test_documents_run_together_have_no_borders() -> None:
    opened = llama()
    (prompt,) = AttentionBasin(slots=3, shuffles=1, separated=False).prompts(opened)
    words = opened.decode(prompt.inputs["input_ids"][0])
    assert "Document" not in words
    first = prompt.segments["text"].mask("document 1")
    tokens = opened.tokenizer(prompt.own.documents[0])["input_ids"]
    assert prompt.inputs["input_ids"][0][first].tolist() == tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": 2}, r"slots=...\) must be 3 to"),
        ({"slots": 40}, "got 40"),
        ({"shuffles": 0}, "a shuffle; got 6 and 0"),
        ({"normalise": "tokens"}, "got 'tokens'"),
        ({"documents": ("a", "b", "c")}, "request= together"),
        ({"documents": ("a", "b"), "request": "c?"}, "3 to 32 documents"),
    ],
)
def test_bad_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        AttentionBasin(**options)


def test_an_encoder_is_told_what_is_missing() -> None:
    with pytest.raises(HeadwiseError, match="decoder-only language model"):
        scan.heads(bert(), questions=["attention_basin"])
