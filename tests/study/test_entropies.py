"""The studies of feature and transfer entropy on a tiny vision transformer."""

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from headwise.models import open_model
from headwise.study.entropies import feature_entropy_depth, rank_correlation, transfer_entropy_choice
from headwise.study.photographs import PHOTOGRAPHS, photographs

pytest.importorskip("skimage.data")


def vit():
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)
    return open_model(Dinov2Model(config).eval())


def test_crops_are_pictures_that_a_seed_decides() -> None:
    some = photographs(PHOTOGRAPHS[:2], crops=3, size=28, seed=1)
    assert some.shape == (3, 3, 28, 28)
    assert torch.equal(some, photographs(PHOTOGRAPHS[:2], crops=3, size=28, seed=1))
    assert -2.2 < some.min() < some.max() < 2.7, "0 to 1, less the mean, over the standard deviation"
    assert some.std() > 0.3


def test_rank_correlation_with_depth() -> None:
    assert rank_correlation([1.0, 5.0, 7.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 5.0, 7.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


def test_both_studies_measure_every_layer() -> None:
    found = feature_entropy_depth(vit(), seeds=[0], crops=6, size=28)
    (row,) = found.measured["seeds"]
    assert np.shape(row["mlp_class_profile"]) == (3,)
    assert found.verdict == ("holds" if min(row["attention_class"], row["mlp_class"]) > 0.5 else "fails")
    found = transfer_entropy_choice(vit(), seeds=[0], crops=6, size=28)
    (row,) = found.measured["seeds"]
    assert len(row["transfer_entropy"]) == len(row["disturbance"]) == 3
    assert min(row["transfer_entropy"]) >= 0
    assert found.verdict == ("holds" if row["correlation"] > 0.5 else "fails")
