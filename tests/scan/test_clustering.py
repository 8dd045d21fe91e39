"""Distances between heads: what they are, and whether layers keep together."""

import numpy as np
import pytest
import xarray as xr

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.scan.clustering import BROAD, largest_entropy
from tests.scan.models import bert, llama

TEXTS = ["It is a truth universally acknowledged, that a single man", "must be in want of a wife."]


def distances(between: float = 1.0) -> xr.DataArray:
    """Heads of a layer stand 0.1 apart, heads of different layers `between`."""
    layer = np.arange(12) // 4
    square = np.where(layer[:, None] == layer, 0.1, between) * (np.arange(12)[:, None] != np.arange(12))
    dims = ("layer_a", "head_a", "layer_b", "head_b")
    coords = {"layer_a": range(3), "head_a": range(4), "layer_b": range(3), "head_b": range(4)}
    return xr.DataArray(square.reshape(3, 4, 3, 4), coords, dims)


def test_distances_are_js_divergences() -> None:
    found = scan.head_distance(llama(), TEXTS).values.reshape(8, 8)
    np.testing.assert_allclose(np.diag(found), 0, atol=1e-9)
    np.testing.assert_allclose(found, found.T)
    assert 0 <= found.min() < found.max() <= np.log(2)


def test_layers_that_keep_together_are_told_from_those_that_do_not() -> None:
    together = scan.layer_contrast(distances(), draws=200)
    assert together["within"] == pytest.approx(0.1)
    assert together["between"] == pytest.approx(1.0)
    assert together["p"] == pytest.approx(1 / 201)
    assert scan.layer_contrast(distances(0.1), draws=200)["p"] == 1


def test_a_map_keeps_near_heads_near() -> None:
    found = scan.head_map(distances(), seed=1)
    assert list(found.columns) == ["layer", "head", "x", "y"]
    assert found.attrs["stress"] < 0.2
    places = found[["x", "y"]].to_numpy()
    apart = np.linalg.norm(places[:, None] - places, axis=-1)
    same = found["layer"].to_numpy()[:, None] == found["layer"].to_numpy()
    assert apart[same].max() < apart[~same].min()


def test_a_plane_is_drawn_as_it_is() -> None:
    points = np.random.default_rng(0).normal(size=(6, 2))
    square = np.linalg.norm(points[:, None] - points, axis=-1)
    found = scan.head_map(xr.DataArray(square.reshape(3, 2, 3, 2), distances()[:, :2, :, :2].coords))
    drawn = found[["x", "y"]].to_numpy()
    np.testing.assert_allclose(np.linalg.norm(drawn[:, None] - drawn, axis=-1), square, atol=0.05)


def test_missing_heads_are_left_out() -> None:
    some = distances().copy()
    some[0, 3], some[:, :, 0, 3] = np.nan, np.nan
    assert len(scan.head_map(some)) == 11
    assert np.isfinite(scan.layer_contrast(some, draws=10)["within"])


def test_behaviours_follow_the_marks() -> None:
    found = scan.behaviours(llama(), TEXTS)
    assert len(found) == 8
    assert "cls" not in found, "not an encoder"
    broad = found["relative_entropy"] > BROAD
    assert (found.loc[broad & (found["previous"] < 0.5), "label"] == "broad").all()
    assert (found["relative_entropy"] <= 1 + 1e-6).all()
    two = scan.behaviours(bert(), TEXTS)
    assert (two["relative_entropy"] <= 1 + 1e-6).all()


def test_the_largest_entropy_counts_what_a_row_sees() -> None:
    opened = llama()
    n = opened.encode(TEXTS[1])["input_ids"].shape[1]
    assert largest_entropy(opened, TEXTS[1:], causal=False) == pytest.approx(np.log(n))
    assert largest_entropy(opened, TEXTS[1:], causal=True) == pytest.approx(np.log(np.arange(1, n + 1)).mean())


def test_bad_input_is_named() -> None:
    with pytest.raises(HeadwiseError, match="distance"):
        scan.layer_contrast(distances().isel(layer_a=0))
    with pytest.raises(HeadwiseError, match="two layers"):
        scan.layer_contrast(distances().isel(layer_a=[0], layer_b=[0]))
