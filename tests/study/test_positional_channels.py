"""The studies of positional channels: what their controls shuffle, and both end to end in small."""

import numpy as np
import torch
from tests.scan.models import llama

from headwise.study.positional_channels import (
    Unplaced,
    positional_channels,
    positional_channels_mask,
    searched,
    shuffled,
)


def test_shuffling_keeps_every_state_and_undoes_the_order() -> None:
    states = np.linspace(0, 1, 100)[None, :, None] * np.ones((8, 1, 3))
    assert searched(states, 20, 10)[0] == 3
    for layers in (False, True):
        other = shuffled(states, 0, layers)
        np.testing.assert_allclose(np.sort(other, 1), states)
        assert (other[0] == other[5]).all() != layers
    assert searched(shuffled(states, 0, layers=True), 20, 10)[0] == 0


def test_the_search_and_its_controls_run_on_a_small_model() -> None:
    found = positional_channels(
        llama(num_hidden_layers=6, hidden_size=128), seeds=[0, 1], samples=2, length=60, skip=20, smooth_skip=15
    )
    first, second = found.measured["seeds"]
    assert first["smoothest"] != second["smoothest"], "seeds draw other tokens"
    assert first["channels_shuffled_mean"] <= first["channels_shuffled"]
    assert found.verdict in ("holds", "fails")


def test_without_positions_only_the_mask_tells_places_apart() -> None:
    ids = torch.randint(9, (1, 12), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for causal in (True, False):
        torch.manual_seed(0)
        model = Unplaced(9, causal, 12, layers=2, width=8).eval()
        with torch.no_grad():
            moved = torch.allclose(model(ids[:, order]).logits, model(ids).logits[:, order], atol=1e-5)
        assert moved != causal


def test_both_models_are_trained_and_searched() -> None:
    found = positional_channels_mask(seeds=[0], steps=2, samples=8, length=64)
    assert [row["causal"] for row in found.measured["models"]] == [True, False]
    assert all(row["loss"] > 0 for row in found.measured["models"])
