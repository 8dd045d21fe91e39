"""The studies of weights, ranks, selection, distributed memory and norms run end to end on small models."""

import numpy as np
import pytest
import torch
from tests.scan.models import bert, llama
from torch.nn import functional as F

from headwise.errors import HeadwiseError
from headwise.scan.sdm import log_intersection
from headwise.study.maps import correct, maps_causal, maps_correlation, shots, token_pairs
from headwise.study.score_rank import low_rank_bottleneck, score_rank_low
from headwise.study.sdm import SDMMemory, flipped, sdm_effective_beta, sdm_exponential, sdm_recall
from headwise.study.selection import normalisation_kinds, selection_limits, softmax_gradient, sparsemax, top_softmax
from headwise.study.unselectable import (
    majority_batch,
    majority_projection,
    unselectable_models,
    unselectable_points,
)


def test_weights_of_a_random_model_say_nothing_about_it() -> None:
    found = maps_correlation(llama(), relations=("pronoun", "name_copying"), pairs=8)
    assert found.verdict == "fails"
    assert set(found.measured) == {"pronoun", "name_copying"}
    assert all(row["r_in_context"] is None or -1 <= row["r_in_context"] <= 1 for row in found.measured.values())


def test_no_relation_is_mastered_by_a_random_model() -> None:
    with pytest.raises(HeadwiseError, match="masters none"):
        maps_causal(llama(), relations=("pronoun", "name_copying"), pairs=6)


def test_removing_heads_is_measured_where_something_is_mastered() -> None:
    found = maps_causal(llama(), relations=("antonym", "past_tense"), pairs=20, draws=1, most=2, base_min=0.0)
    assert found.measured["accuracy"] == 0
    assert all(row["drop"] == 0 for row in found.measured["relations"].values())
    assert found.verdict == "fails"


def test_heads_are_removed_at_the_last_token_only() -> None:
    opened = llama()
    pairs = token_pairs(opened, "pronoun", 5)
    ids = shots(opened, "pronoun", pairs)
    assert len(ids) == 2
    assert ids[0, -2] == pairs[3, 0]
    assert pairs[0].tolist() in ids[0].unfold(0, 3, 1)[:, ::2].tolist(), "an example: word, arrow, word"
    everything = [(site.layer, head) for site in opened.sites for head in range(site.heads)]
    with torch.no_grad():  # nothing but the last token's own path is left: its embedding and the feed-forward parts
        x = opened.model.model.embed_tokens(ids[:, -1:])
        for layer in opened.model.model.layers:
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        expected = opened.model.lm_head(opened.model.model.norm(x))[:, -1].argmax(-1)
    assert correct(opened, ids, expected, everything).all()


def test_the_rank_bottleneck_on_few_tokens() -> None:
    found = low_rank_bottleneck(tokens=6, dims=(2, 4, 5, 6), seeds=(0,))
    assert found.verdict == "holds"
    assert found.measured["log_rank"] == [5]


def test_rank_beta_and_selection_studies_measure_small_models() -> None:
    found = score_rank_low([llama(), bert()], tokens=60)
    assert set(found.measured) == {"LlamaForCausalLM", "BertModel"}
    assert found.measured["BertModel"]["random_rank"] <= 8
    found = sdm_effective_beta([bert()], tokens=60)
    assert 0 <= found.measured["BertModel"]["share_inside"] <= 1
    assert selection_limits(llama(), lengths=(20, 40), texts=1, top=(2, 5, 10, 20)).measured["slope_of_mean"] < -0.8
    assert softmax_gradient(llama(), length=20, texts=1).measured["within_bound"]


def test_normalisation_kinds_on_short_rows() -> None:
    found = normalisation_kinds(lengths=(16, 64), rows=20, seeds=(0,)).measured
    assert found["within_bounds"]
    assert found["slopes"]["top8"] > found["slopes"]["softmax"]


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    scores = torch.tensor([[2.0, 0, 0], [0.5, 0.3, 0.1], [0, 0, 0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0, 0], [0.5333, 0.3333, 0.1333], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(sparsemax(scores), expected, atol=1e-4, rtol=0)
    assert (top_softmax(scores, 1)[0] == torch.tensor([1.0, 0, 0])).all()


def test_memory_studies_measure_what_they_say() -> None:
    found = sdm_exponential(radii=(5, 11), patterns=20, seeds=(0,)).measured
    assert found["11"]["r2"] > found["5"]["r2"]
    assert sdm_recall(stored=20, flips=(0, 4), seeds=(0,)).measured["binary"][0] == 1


@pytest.mark.parametrize("mode", ["binary", "continuous", "softmax"])
def test_a_memory_recalls_few_patterns(mode: str) -> None:
    draw = np.random.default_rng(0)
    stored = draw.integers(0, 2, (5, 64)).astype(float)
    memory = SDMMemory(stored, 11, mode)
    np.testing.assert_array_equal(memory.read(flipped(stored, 6, draw)), stored)
    assert (np.abs(flipped(stored, 6, draw) - stored).sum(1) == 6).all()


def test_a_memory_weighs_by_the_overlap_and_keeps_strangers() -> None:
    stored = np.stack([np.zeros(12), np.r_[np.ones(3), np.zeros(9)]])
    overlap = np.exp(log_intersection(12, 3))
    np.testing.assert_allclose(
        SDMMemory(stored, 3).weights(stored[:1]), [[overlap[0], overlap[3]] / (overlap[0] + overlap[3])]
    )
    np.testing.assert_array_equal(SDMMemory(stored[:1], 3).read(np.ones((1, 12))), np.ones((1, 12)))
    with pytest.raises(HeadwiseError, match="wanted one of binary"):
        SDMMemory(stored, 3, "fuzzy")


def test_majority_rows_have_a_clear_winner() -> None:
    ids, winner = majority_batch(50, 5, 30, torch.Generator().manual_seed(0))
    counts = F.one_hot(ids, 5).sum(1)
    best = counts.topk(2).values
    assert (counts.argmax(-1) == winner).all()
    assert (best[:, 0] - best[:, 1] >= 6).all()


def test_norm_studies_measure_small_cases() -> None:
    found = unselectable_points(dims=(2, 4), counts=(5, 30), seeds=(0,))
    assert found.verdict == "holds"
    assert unselectable_models([bert()], tokens=40).measured["BertModel"]["after"] == 0
    found = majority_projection(seeds=(0,), steps=20, rows=16, classes=4, length=12, every=10).measured
    assert set(found) == {"projected", "not_projected"}
    assert 0 <= found["projected"]["angle"][0] <= 90
