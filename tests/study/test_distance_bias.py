"""The distance-bias study on small models: with rotation, and with none to find."""

import numpy as np
import pytest
import torch
from tests.scan.models import llama

from headwise.attention import Scores, attend
from headwise.errors import HeadwiseError
from headwise.scan.distance_bias import DistanceBias, draw
from headwise.scan.tokens import random_tokens
from headwise.study.distance_bias import correlations, distance_bias_rope, unrotated_gap

SMALL = DistanceBias(near=(0, 8), far=(40, 48), queries=10, pairs=40)


def test_without_rotation_the_gap_is_that_of_a_model_without_it() -> None:
    opened = llama(num_hidden_layers=1)
    ids = random_tokens(opened, 1, 96, seed=0)[0]
    found = unrotated_gap(opened, ids, SMALL)
    opened.model.model.rotary_emb.inv_freq.zero_()
    plan = draw(SMALL, 96)
    with attend(opened, readings=[plan.readings[0]]) as run, torch.no_grad():
        opened.model(input_ids=ids[None])
    scores = run.tree["text"]["pairs"].isel(sample=0).transpose("layer", "head", "query", "target").values
    gap = (scores[..., :4] - scores[..., 4:]).reshape(found.shape)
    assert isinstance(plan.readings[0], Scores)
    np.testing.assert_allclose(found * 8**-0.5, gap, atol=1e-4)  # the study leaves out the scale, 1 / sqrt(head size)


def test_the_study_measures_every_condition() -> None:
    found = distance_bias_rope(llama(), SMALL, length=96)
    assert set(found.measured["clear_share"]) == {"text", "shuffled", "unrotated"}
    assert found.verdict == "fails", "a random model has no bias to speak of"
    assert found.seeds == [0, 1]


def test_a_model_without_rotary_embeddings_is_refused() -> None:
    with pytest.raises(HeadwiseError, match="has none"):
        correlations({"distance_bias_curve": None})
