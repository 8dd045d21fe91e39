"""Scans of converted models: every mechanism is read as any other attention."""

from __future__ import annotations

import pytest
import torch

from headwise import scan, swap
from headwise.attention import HeadGain, Map, attend
from headwise.models import open_model
from tests.scan.models import llama, tokenizer

TEXT = ["The cat sat on the mat and looked at the dog, who looked back at the cat and sat on the mat."]
OWN = {
    "super_attention": {"max_len": 128},
    "positional_attention": {"length": 128},
    "fixed_qk_attention": {"source": "static"},
    "fixed_head_attention": {"head_dim": 16},
    "sigmoid_attention": {"b": -2.0},
}
CAUSAL = [name for name, kind in swap.MECHANISMS.items() if kind.causal_too and name != "gated_mlp_mixer"]
QUESTIONS = ["sinks", "entropy", "distance"]


@pytest.mark.parametrize("name", CAUSAL)
def test_every_mechanism_in_a_trained_model_is_scanned(name: str):
    opened = llama()
    with swap.convert(opened, name, **OWN.get(name, {})):
        result = scan.heads(open_model(opened.model, tokenizer=tokenizer()), texts=TEXT, questions=QUESTIONS)
    assert len(result.heads) == 8
    assert result.heads[QUESTIONS].notna().all(axis=None)


def test_weights_that_do_not_sum_to_one_are_scanned_as_they_are():
    opened = llama()
    with torch.no_grad(), attend(opened, [Map()]) as run:
        opened.model(**opened.encode(TEXT[0]))
    p = torch.from_numpy(run.tree["text"].dataset["map"].sel(layer=0).isel(sample=0).values)
    want = {"match": p[..., 0] / (1 + p[..., 0]), 20.0: torch.ones_like(p[..., 0])}
    for b, first in want.items():
        with swap.convert(opened, "sigmoid_attention", layers=[0], b=b):
            heads = scan.heads(open_model(opened.model, tokenizer=tokenizer()), texts=TEXT, questions=["sinks"]).heads
        found = torch.tensor(heads[heads["layer"] == 0]["sinks"].to_numpy())
        torch.testing.assert_close(found, first.mean(-1).to(found), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["nexus_attention", "multi_hop_attention", "dual_attention"])
def test_layers_that_attend_in_ways_of_their_own_answer_all_questions(name: str):
    opened = llama()
    with swap.convert(opened, name):
        result = scan.heads(
            open_model(opened.model, tokenizer=tokenizer()),
            texts=TEXT,
            questions=["induction_heads", "sink_anatomy", "effective_beta", "score_rank"],
        )
    assert len(result.heads) == 8


def test_inner_calls_are_read_where_they_are_asked_for_and_edited_always():
    torch.manual_seed(0)
    layer, x = swap.NexusAttention(32, 4, order=2, causal=True, gate=0.5).eval(), torch.randn(1, 6, 32)
    maps = []
    for inner in (False, True):
        with torch.no_grad(), attend(layer, [Map()], inner=inner) as run:
            layer(x)
        maps.append(next(iter(run.tree.children.values())).dataset["map"].fillna(0.0))
    assert "call" not in maps[0].dims
    assert maps[1].sizes["call"] == 2
    assert abs(maps[1].isel(call=1) - maps[0]).max() < 1e-6
    assert abs(maps[1].isel(call=0) - maps[0]).max() > 1e-4
    with torch.no_grad(), attend(layer, [Map()], edits=[HeadGain(gain=0.0)]) as run:
        assert not layer(x).abs().sum()
    weights = next(iter(run.tree.children.values())).dataset["map"].fillna(0.0)
    assert abs(weights - maps[0]).max() > 1e-4
