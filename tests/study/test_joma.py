"""JoMA's identities and limits, and its studies on small settings."""

import math

import numpy as np
import pytest

from headwise import HeadwiseError
from headwise.study.entropy_training import entropy_dip_and_rise
from headwise.study.joma import frequencies, invariance, joma_entropy, joma_invariance, joma_toy


def test_without_a_normaliser_the_identity_is_exact_but_for_the_step() -> None:
    errors = []
    for lr, steps in ((0.02, 500), (0.01, 1000)):
        found = invariance(steps=steps, lr=lr, normalise=False)
        errors.append(np.abs(found.z[-1] - found.predicted[-1]).max())
    assert errors[0] < 0.02 * np.abs(found.z[-1]).max()
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)


def test_the_prediction_starts_where_z_does_and_follows_it() -> None:
    found = invariance(steps=300)
    assert (found.z[0] == 0).all()
    assert (found.predicted[0] == 0).all()
    assert found.correlation().shape == (300,)
    assert found.correlation()[-1] > 0.9
    x = frequencies()
    np.testing.assert_allclose(x.sum(0), 1)
    assert (x[10:] == x[10]).all(), "common tokens are alike within a class"


def test_tokens_of_one_salience_keep_even_attention() -> None:
    path, entropy = joma_toy(np.full(6, 2.0), steps=2000)
    np.testing.assert_allclose(entropy, math.log(6))
    assert (path[-1] == path[-1, 0]).all()
    assert 1.5 < path[-1, 0] < 2


def test_more_salient_tokens_converge_first_and_the_linear_case_stays_sparse() -> None:
    mu = np.array([1.0, 2.0, 3.0])
    path, entropy = joma_toy(mu, steps=8000)
    half = (path >= mu / 2).argmax(0)
    assert half[2] < half[1] < half[0]
    assert entropy.min() < min(entropy[0], entropy[-1]) - 0.05
    _, linear = joma_toy(mu, linear=True)
    assert (np.diff(linear) <= 1e-12).all()
    assert linear[-1] < 1e-6


def test_the_studies_measure_what_they_say() -> None:
    assert joma_entropy(seeds=[0], steps=5000).verdict == "holds"
    assert joma_entropy(seeds=[0], steps=100).verdict == "fails", "too short to rise again"
    (row,) = joma_invariance(seeds=[0], steps=20).measured["seeds"]
    assert row["least"] <= row["mean"] <= 1
    found = entropy_dip_and_rise(seeds=[0], rates=[1e-3], steps=4, each=2)
    assert [run["activation"] for run in found.measured["runs"]] == ["relu", "linear"]
    assert found.verdict == "fails", "four steps change nothing"
    assert np.shape(found.measured["runs"][0]["stable_rank"]) == (2, 2)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(HeadwiseError, match=r"got 0, 3.0, 0.02"):
        joma_toy(np.ones(3), steps=0)
