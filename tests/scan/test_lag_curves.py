"""Lag curves against plain loops over queries and keys, and the CMR model against the paper's own way of writing it."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.attention import Inputs, attend
from headwise.errors import HeadwiseError
from headwise.scan import cmr
from headwise.scan.lag_curves import CmrDistance
from tests.scan.models import bert, circuit, llama


def by_inverse(beta: float, items: int) -> np.ndarray:
    shift = np.eye(items + 1, k=1)
    return np.linalg.inv(np.eye(items + 1) - (1 - beta) * shift) @ shift


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
def test_the_memory_is_the_matrix_inverse(beta: float) -> None:
    np.testing.assert_allclose(cmr.memory(beta, 20), by_inverse(beta, 20), atol=1e-6)


def test_without_drift_in_encoding_recall_is_pure_induction() -> None:
    table = cmr.cmr_table([1.0], [1.0], [0.0], sims=20, starts=5).numpy()
    np.testing.assert_allclose(table[0, 0, 0], np.eye(17)[9])


def slow_crp(beta_enc: float, beta_rec: float, gamma: float, start: int, sims: int) -> np.ndarray:
    """One recall, one step at a time."""
    draw, m = np.random.default_rng(0), by_inverse(beta_enc, 100)
    shares = []
    for _ in range(sims):
        t, here, lags = np.eye(101)[start], start, []
        while len(lags) < 100:
            p = m.T @ t
            item = draw.choice(101, p=p / p.sum())
            if item == 100:
                break
            lags.append(item - here)
            incoming = (1 - gamma) * np.eye(101)[item] + gamma * m[:, item]
            t = (1 - beta_rec) * t + beta_rec * incoming / np.linalg.norm(incoming)
            t, here = t / np.linalg.norm(t), item
        if lags:
            shares.append([np.mean(np.array(lags) == lag) for lag in range(-8, 9)])
    crp = np.mean(shares, 0)
    return crp / crp.sum()


@pytest.mark.parametrize("setting", [(0.5, 0.6, 0.3), (0.8, 0.0, 1.0)])
def test_simulation_side_by_side_equals_one_at_a_time(setting: tuple[float, float, float]) -> None:
    table = cmr.cmr_table(*([x] for x in setting), sims=1000, starts=1).numpy()[0, 0, 0]
    np.testing.assert_allclose(table, slow_crp(*setting, start=0, sims=100), atol=0.03)


def test_the_shipped_table_is_what_the_simulation_gives() -> None:
    chosen = [7, 19], [0, 8, 20], [0, 5]
    fresh = cmr.cmr_table(
        cmr.BETA_ENC[chosen[0]].tolist(), cmr.BETA_REC[chosen[1]].tolist(), cmr.GAMMA[chosen[2]].tolist(), sims=20
    )
    stored = cmr.shipped_table()[np.ix_(*chosen)]
    assert cmr.shipped_table().shape == (20, 21, 11, 17)
    np.testing.assert_allclose(stored, fresh, atol=0.03)
    assert np.abs(stored - fresh.numpy()).mean() < 0.003


def test_a_curve_of_the_table_has_distance_0_and_its_own_setting() -> None:
    table = cmr.shipped_table()
    places = [(5, 12, 4), (10, 10, 5), (14, 18, 2)]
    curves = np.stack([3 * table[place][3:14] - 7 for place in places])
    found = cmr.cmr_fit(curves.reshape(1, 3, 11))
    np.testing.assert_allclose(found.distance, 0, atol=1e-9)
    expected = [(cmr.BETA_ENC[i], cmr.BETA_REC[j], cmr.GAMMA[k]) for i, j, k in places]
    np.testing.assert_allclose(found.parameters[0, :, :3], expected)
    np.testing.assert_allclose(found.parameters[0, :, 3], [3 * table[p][3:14].sum() for p in places])


def test_the_distance_is_a_share_of_the_curves_variance() -> None:
    table = cmr.shipped_table()[10:11, 10:11, 5:6]
    curve = np.random.default_rng(0).normal(size=11)
    model = table[0, 0, 0, 3:14] - table[0, 0, 0, 3:14].min()
    head = curve - curve.min()
    expected = ((model * head.max() / model.max() - head) ** 2).mean() / head.var()
    assert cmr.cmr_fit(curve, table).distance == pytest.approx(expected)


def test_flat_or_unknown_curves_have_no_distance() -> None:
    found = cmr.cmr_fit(np.stack([np.full(11, 2.0), np.full(11, np.nan), np.eye(11)[6]]))
    assert np.isnan(found.distance).tolist() == [True, True, False]
    assert np.isnan(found.parameters[:2]).all()


def test_the_gaussian_baseline_fits_a_gaussian() -> None:
    pytest.importorskip("scipy")
    lag = np.arange(-5, 6)
    bell = 1 + 2 * np.exp(-((lag - 1) ** 2) / (2 * 1.5**2))
    found = cmr.gaussian_distance(np.stack([bell, np.where(lag % 2, 1.0, -1.0), np.ones(11)]))
    assert found[0] < 1e-6
    assert found[1] > 0.3
    assert np.isnan(found[2])


def test_the_lag_curve_is_the_mean_score_around_the_earlier_copy() -> None:
    opened = llama()
    question = CmrDistance(length=9, seeds=2, max_lag=4, fit_lag=3)
    found = scan.heads(opened, questions=[question])
    seen = {lag: [] for lag in range(-4, 5)}
    for prompt in question.prompts(opened):
        ids = prompt.inputs["input_ids"]
        assert ids.shape == (1, 19)
        assert ids[0, 1:10].tolist() == ids[0, 10:].tolist()
        assert len(set(ids[0, 1:10].tolist())) == 9
        with attend(opened, readings=[Inputs(("q", "k"))]) as run, torch.no_grad():
            opened.model(input_ids=ids)
        q, k = (run.tree["text"][f"input_{w}"].isel(sample=0) for w in "qk")
        q = q.transpose("layer", "head", ..., "channel").values
        k = k.transpose("layer", "head", ..., "channel").values
        for i in range(9):
            for j in range(9):
                if abs(j - i) <= 4:
                    seen[j - i].append((q[:, :, 10 + i] * k[:, :, 1 + j]).sum(-1) / np.sqrt(8))
    curve = found.data["lag_curve"].sel(stream="text").transpose("lag", "layer", "head")
    for lag, scores in seen.items():
        assert len(scores) == 2 * (9 - abs(lag))
        np.testing.assert_allclose(curve.sel(lag=lag), np.mean(scores, 0), atol=1e-5)
        error = found.data["lag_curve_sem"].sel(stream="text", lag=lag).transpose("layer", "head")
        np.testing.assert_allclose(error, np.std(scores, 0, ddof=1) / np.sqrt(len(scores)), atol=1e-5)
    fitted = cmr.cmr_fit(curve.sel(lag=slice(-3, 3)).transpose("layer", "head", "lag").values)
    np.testing.assert_allclose(found.data["cmr_distance"].sel(stream="text"), fitted.distance, rtol=1e-4)
    np.testing.assert_allclose(found.data["cmr_parameters"].sel(stream="text"), fitted.parameters, rtol=1e-4)


def test_an_induction_circuit_is_the_sharpest_case_of_the_model() -> None:
    table = scan.heads(circuit(positions=80), questions=[CmrDistance(length=30, seeds=1)]).heads.set_index("layer")
    assert table.loc[1, "cmr_distance"] == pytest.approx(0, abs=1e-6)
    assert table.loc[1, "recall_next"] == pytest.approx(1, abs=1e-4)
    assert table.loc[1, "recall_asymmetry"] > 0
    assert np.isnan(table.loc[0, "cmr_distance"]), "the head that looks one back has no score there at all"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CmrDistance(length=5), "max_lag < length"),
        (lambda: CmrDistance(fit_lag=9, max_lag=9), "fit_lag at most 8"),
        (lambda: CmrDistance(length=600).prompts(llama()), "lower length="),
        (lambda: cmr.cmr_fit(np.zeros(10)), "curve"),
        (lambda: cmr.cmr_fit(np.zeros(19)), "curve"),
        (lambda: cmr.cmr_table(sims=0), "sims"),
        (lambda: scan.heads(bert(), questions=[CmrDistance()]), "language model"),
    ],
)
def test_bad_input_is_named(make: object, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        make()  # type: ignore[operator]
