"""Averages over prompts equal the averages over everything."""

import numpy as np
import xarray as xr

from headwise.scan.pool import pool


def _part(rows: np.ndarray) -> xr.Dataset:
    count = len(rows)
    error = rows.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.full(rows.shape[1], np.nan)
    dims = ("head",)
    return xr.Dataset(
        {"x": (dims, rows.mean(0)), "x_count": (dims, np.full(rows.shape[1], count)), "x_sem": (dims, error)}
    )


def test_counted_means_equal_the_mean_of_all_queries() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 3)) for n in (5, 1, 40)]
    together = np.concatenate(parts)
    found = pool([_part(p) for p in parts])
    np.testing.assert_allclose(found["x"], together.mean(0))
    np.testing.assert_allclose(found["x_count"], 46)
    np.testing.assert_allclose(found["x_sem"], together.std(0, ddof=1) / np.sqrt(46))


def test_uncounted_means_weigh_known_prompts_alike() -> None:
    parts = [xr.Dataset({"x": ("head", np.array(row))}) for row in ([1.0, np.nan], [3.0, 4.0], [5.0, 6.0])]
    found = pool(parts)
    np.testing.assert_allclose(found["x"], [3.0, 5.0])
    np.testing.assert_allclose(found["x_count"], [3, 2])
    np.testing.assert_allclose(found["x_sem"], [2 / np.sqrt(3), np.sqrt(2) / np.sqrt(2)])


def test_prompts_with_different_labels_are_joined() -> None:
    parts = [
        xr.Dataset({"mass": ("segment", [0.25, 0.75]), "mass_count": ("segment", [4, 4])}, {"segment": ["a", "b"]}),
        xr.Dataset({"mass": ("segment", [1.0]), "mass_count": ("segment", [4])}, {"segment": ["b"]}),
    ]
    found = pool(parts)
    assert float(found["mass"].sel(segment="a")) == 0.25
    assert float(found["mass"].sel(segment="b")) == 0.875
