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
