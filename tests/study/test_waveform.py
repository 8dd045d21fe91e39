"""The studies of the rotary waveform on small models."""

import numpy as np
import pytest
import torch
from tests.scan.models import llama

from headwise import scan
from headwise.study.waveform import envelope, waveform_attention, waveform_envelope


def test_the_envelope_is_the_largest_waveform() -> None:
    both = [scan.rope_waveform(scan.rope_frequencies(b, 16), 40)[1:] for b in (100.0, 1e4)]
    np.testing.assert_allclose(envelope([100.0, 1e4], 16, 40), np.maximum(*both))


def test_every_set_is_measured_alone_and_together() -> None:
    found = waveform_envelope(max_distance=200)
    assert len(found.measured["sets"]) == 4
    for row in found.measured["sets"]:
        assert row["troughs"] > 10
        assert row["with_trend_set"] >= row["with_trend_alone"], "the envelope lies above its parts"
    assert found.verdict in ("holds", "fails")


def test_attention_made_by_rotation_alone_follows_its_own_base() -> None:
    """Tokens all alike, so that only the rotation tells keys apart; a random model does not hold."""
    opened = llama(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    with torch.no_grad():
        opened.model.model.embed_tokens.weight.fill_(1.0)
        for name in ("q_proj", "k_proj"):
            getattr(opened.model.model.layers[0].self_attn, name).weight.fill_(1 / 32)
    found = waveform_attention(opened, span=128, seeds=1, ratios=(1.0, 20.0))
    assert found.measured["base"] == pytest.approx(10000, rel=1e-3)
    own, other = found.measured["bases"]
    assert own["with_other_bases"][0] == own["without_trend"] > own["with_other_bases"][1]
    assert other["with_other_bases"][1] == other["without_trend"] > other["with_other_bases"][0]
    assert waveform_attention(llama(), span=16, seeds=1).verdict == "fails"
