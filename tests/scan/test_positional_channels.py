"""The search for positional channels against the paper's recipe in plain loops, and on states made by hand."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.attention.hidden import record
from headwise.errors import HeadwiseError
from headwise.scan.positional_channels import mean_states, monotonic, rank_channels, roughness
from tests.scan.models import llama


def drawn(layers: int = 8, length: int = 120, channels: int = 12) -> np.ndarray:
    """Channels that rise more or less clearly, all alike in every layer but for some noise."""
    draw = np.random.default_rng(0)
    walk = draw.normal(size=(1, length, channels)).cumsum(1) + draw.normal(size=(layers, length, channels))
    return walk + np.linspace(-20, 20, channels) * np.linspace(0, 1, length)[:, None]


def slow(states: np.ndarray, skip: int, smooth_skip: int) -> list[tuple[int, int, float]]:
    """The search in the words of the paper's code: one channel, one layer at a time."""
    signal = pytest.importorskip("scipy.signal")
    rows = []
    for channel in range(states.shape[2]):
        rising, falling = [], []
        for layer in range(2, len(states) - 1):
            y = states[layer, skip:, channel]
            y = (y - y.min()) / (y.max() - y.min())
            x = np.arange(len(y))
            step = np.diff(np.poly1d(np.polyfit(x, y, 3))(x))
            if (step >= 0).all():
                rising.append(layer)
            elif (step <= 0).all():
                falling.append(layer)
        mine = rising if len(rising) > len(falling) else falling
        if len(mine) > len(states) / 4:
            bends = []
            for layer in mine:
                y = states[layer, smooth_skip:, channel]
                y = signal.savgol_filter((y - y.min()) / (y.max() - y.min()), 10, 3)
                bends.append((np.diff(np.diff(y)) ** 2).sum())
            rows.append((channel, len(mine), min(bends)))
    return sorted(rows, key=lambda row: row[2])


def test_the_search_equals_the_papers_loops() -> None:
    states = drawn()
    table = rank_channels(states, skip=40, smooth_skip=30)
    expected = slow(states, 40, 30)
    assert 0 < len(expected) < 12
    assert table["channel"].tolist() == [row[0] for row in expected]
    assert table["layers"].tolist() == [row[1] for row in expected]
    np.testing.assert_allclose(table["smoothness"], [row[2] for row in expected])


def test_rising_falling_waving_and_constant_curves() -> None:
    x = np.linspace(0, 1, 200)
    curves = np.stack([x**3, -np.log(1 + x), np.sin(9 * x), np.full(200, 2.5), 1e6 + 1e-3 * x], 1)
    assert monotonic(curves).tolist() == [1, -1, 0, 0, 1]


def test_channels_made_by_hand_are_found_smoothest_first() -> None:
    draw = np.random.default_rng(1)
    wave = np.sin(np.linspace(0, 20, 200))[:, None] * np.ones(5)
    states = np.stack([wave] * 8)
    rise = np.linspace(0, 1, 200)
    states[:, :, 3] = rise + 0.05 * draw.normal(size=(8, 200))
    states[:, :, 1] = -rise
    states[:4, :, 4] = rise  # monotonic in layers 2 and 3 only: no more than a quarter of the eight
    table = rank_channels(states, skip=60, smooth_skip=40)
    assert table["channel"].tolist() == [1, 3]
    assert table["sign"].tolist() == [-1, 1]
    assert table["layers"].tolist() == [5, 5]
    assert roughness(rise) < 1e-4 < roughness(states[2, :, 3])


def test_mean_states_are_the_mean_of_what_the_blocks_write() -> None:
    opened = llama()
    ids = torch.randint(3, 100, (5, 9), generator=torch.Generator().manual_seed(0))
    one_by_one = [record(opened, {"input_ids": row[None]})["block_out"][:, 0] for row in ids]
    np.testing.assert_allclose(mean_states(opened, ids, batch=2), torch.stack(one_by_one).double().mean(0), atol=1e-5)


def test_the_result_is_plain_data_for_whoever_scales_the_channels() -> None:
    opened = llama(num_hidden_layers=6, hidden_size=32)
    given = {"samples": 3, "length": 60, "skip": 20, "smooth_skip": 15, "topk": 2}
    found = scan.positional_channels(opened, **given)
    again = scan.positional_channels(opened, **given)
    assert found.channels == tuple(found.table["channel"].head(2))
    assert found.channels == again.channels
    assert all(type(c) is int and 0 <= c < 32 for c in found.channels)
    assert found.layers == (2, 5)
    tokens = torch.randint(3, 100, (2, 60), generator=torch.Generator().manual_seed(0))
    mine = scan.positional_channels(opened, tokens, skip=20, smooth_skip=15).table
    assert mine.equals(rank_channels(mean_states(opened, tokens), 20, 15))


@pytest.mark.parametrize("shape", [(4, 200, 3), (8, 50, 3)])
def test_too_little_to_search_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(HeadwiseError, match="Wanted states of at least 5 layers"):
        rank_channels(np.zeros(shape), skip=40, smooth_skip=30)
