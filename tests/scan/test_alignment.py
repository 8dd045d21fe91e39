"""Alignment with another system: limit cases, slow references, curves over layers."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.scan.alignment import (
    METHODS,
    PENALTIES,
    align,
    delayed,
    fold_of,
    held_out,
    mutual_neighbours,
    procrustes,
    ridge,
    rsa,
)
from headwise.scan.layer_alignment import curve, ila_index, ila_interval
from tests.scan.models import bert, llama

TEXTS = [f"It is a truth universally {word} acknowledged" for word in "man wife fortune want good single be in".split()]


def noise(rows: int = 60, columns: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(noise(size, size, 9))[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_system_is_aligned_with_itself_and_not_with_noise(method: str) -> None:
    x = noise()
    assert align(x, x, method).value == pytest.approx(1, abs=1e-3 if method == "ridge" else 1e-9)
    unrelated = align(x, noise(seed=1), method, permutations=9)
    assert unrelated.value < 0.4
    assert align(x, x, method, permutations=9).p == pytest.approx(1 / 10)
    assert unrelated.p > 0.1


@pytest.mark.parametrize("method", ["cka", "mknn", "procrustes", "rsa"])
def test_rotation_and_scale_change_nothing(method: str) -> None:
    x, z = noise(), noise(seed=1) + noise()
    same = dict(standardise=False, distance="euclidean") if method == "rsa" else dict(standardise=False)
    first = align(x, z, method, **same).value
    assert align(x, 2 * z @ rotation(5), method, **same).value == pytest.approx(first, abs=1e-9)


def test_ridge_finds_a_linear_map_and_says_which_targets() -> None:
    x = noise(200)
    z = torch.cat([x @ noise(5, 2, 3), noise(200, 1, 4)], 1)
    found = align(x, z, "ridge")
    assert (found.per_target[:2] > 0.999).all()
    assert abs(found.per_target[2]) < 0.2
    assert found.value == pytest.approx(found.per_target.mean())
    halved = align(x, z, "ridge", ceiling=[0.5, 1.0, 1.0])
    np.testing.assert_allclose(halved.per_target / found.per_target, [2, 1, 1])


def test_ridge_equals_its_normal_equations() -> None:
    x, z, at = noise(40), noise(40, 3, 1), noise(7, 5, 2)
    mean, spread = x.mean(0), x.std(0)
    a, b = (x - mean) / spread, (at - mean) / spread
    for guess, penalty in zip(ridge(x, z, at), PENALTIES, strict=True):
        weights = torch.linalg.solve(a.T @ a + penalty * torch.eye(5), a.T @ (z - z.mean(0)))
        torch.testing.assert_close(guess, b @ weights + z.mean(0))


def test_predictions_never_see_their_own_fold() -> None:
    x, z = noise(), noise(seed=1)
    split = fold_of(60, 3, None)
    first = held_out(x, z, split)
    other = z.clone()
    other[split == 1] += 100
    torch.testing.assert_close(held_out(x, other, split)[split == 1], first[split == 1])


def test_what_nuisance_explains_is_not_counted() -> None:
    length = noise(300, 1, 5)
    x, z = noise(300) + 3 * length @ noise(1, 5, 6), noise(300, 4, 1) + 3 * length @ noise(1, 4, 7)
    for method in ("rsa", "cka", "procrustes"):
        plain, clean = align(x, z, method).value, align(x, z, method, nuisance=length).value
        assert plain > 0.25 > 0.2 > clean
    assert align(x, z, "ridge", nuisance=length).unique == pytest.approx(0, abs=0.05)
    shared = z + 2 * noise(300)[:, :4]
    assert align(x, shared, "ridge", nuisance=length).unique > 0.1


def test_neighbours_agree_by_chance_as_often_as_counted() -> None:
    found = np.mean([mutual_neighbours(noise(80, 8, n), noise(80, 8, n + 100), 10) for n in range(20)])
    assert found == pytest.approx(10 / 79, abs=0.015)
    x, z = noise(12, 3), noise(12, 3, 1)
    near = []
    for y in (x, z):
        cosine = torch.nn.functional.cosine_similarity(y[:, None], y[None], dim=-1).fill_diagonal_(-9)
        near.append([set(row.topk(3).indices.tolist()) for row in cosine])
    slow = np.mean([len(a & b) / 3 for a, b in zip(*near, strict=True)])
    assert mutual_neighbours(x, z, 3) == pytest.approx(slow)


def test_procrustes_is_what_the_best_rotation_leaves() -> None:
    from scipy.spatial import procrustes as reference

    x, z = noise(30, 4), noise(30, 4, 1) + noise(30, 4)
    disparity = reference(x.numpy(), z.numpy())[2]
    assert procrustes(x, z) ** 2 == pytest.approx(1 - disparity)


def test_rsa_is_the_rank_correlation_of_dissimilarities() -> None:
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    x, z = noise(20, 6), noise(20, 7, 1)
    for distance in ("correlation", "euclidean"):
        expected = spearmanr(pdist(x.numpy(), distance), pdist(z.numpy(), distance)).statistic
        assert rsa(x, z, distance) == pytest.approx(expected)


def test_folds_are_contiguous_and_keep_groups_together() -> None:
    assert fold_of(6, 3, None).tolist() == [0, 0, 1, 1, 2, 2]
    assert fold_of(6, 2, ["a", "b", "b", "b", "c", "d"]).tolist() == [0, 0, 0, 0, 1, 1]


def test_delays_look_back() -> None:
    x = torch.arange(1.0, 4.0)[:, None]
    assert delayed(x, (0, 1, 2)).tolist() == [[1, 0, 0], [2, 1, 0], [3, 2, 1]]


def test_curves_over_layers_heads_and_models() -> None:
    one, other = llama(), bert()
    target = scan.layer_features(other, TEXTS, "mean")[-1]
    layers = scan.layer_alignment(one, target, TEXTS, "procrustes", rows="mean")
    assert layers.dims == ("layer",)
    direct = align(scan.layer_features(one, TEXTS, "mean")[1], target, "procrustes").value
    assert layers.sel(layer=1).item() == pytest.approx(direct)
    heads = scan.layer_alignment(one, target, TEXTS, "mknn", level="head", k=2)
    assert heads.dims == ("layer", "head")
    assert heads.shape == (2, 4)
    both = scan.layer_alignment(one, other, TEXTS, "procrustes", rows="mean")
    assert both.dims == ("layer_a", "layer_b")
    np.testing.assert_allclose(both.sel(layer_b=1), layers)


def test_a_peak_in_the_middle_is_an_advantage() -> None:
    found = ila_index([0.1, 0.5, 0.4, 0.2])
    assert (found.layer, found.depth, found.peak, found.last) == (1, 0.5, 0.5, 0.2)
    assert found.advantage == pytest.approx(0.3)
    assert ila_index([0.1, 0.2]).advantage == 0


def test_the_interval_tells_an_advantage_from_none() -> None:
    target = noise(120, 6)
    layers = torch.stack([noise(120, 6, 1), target + 0.3 * noise(120, 6, 2), target + 3 * noise(120, 6, 3)])
    found = ila_interval(layers, target, draws=30)
    assert found.layer == 1
    assert 0 < found.low < found.advantage < found.high
    again = ila_interval(layers, target, draws=30)
    assert again == found
    even = torch.stack([target + 0.5 * noise(120, 6, 4), target + 0.5 * noise(120, 6, 5)])
    assert ila_interval(even, target, draws=30).low < 0.02
    assert curve(layers, target, "cka", nuisance=noise(120, 1, 8)).shape == (3,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: align(noise(), noise(10)), "the same rows"),
        (lambda: align(noise(), noise(), "brain"), "method"),
        (lambda: align(noise(), noise(), "mknn", k=60), "k:"),
        (lambda: align(noise(), noise(), "rsa", distance="city"), "distance"),
        (lambda: align(noise(), noise(), "ridge", folds=1), "folds"),
        (lambda: align(noise(), noise(), "ridge", groups=[1, 2]), "groups"),
        (lambda: align(noise(), noise(), "ridge", ceiling=0.0), "ceiling"),
        (lambda: delayed(noise(), (60,)), "delays"),
        (lambda: ila_index([0.3]), "scores"),
        (lambda: ila_interval(noise()[None], noise(), share=1.0), "share"),
        (lambda: scan.layer_alignment(llama(), noise(8), TEXTS, level="neuron"), "level"),
        (lambda: scan.layer_alignment(llama(), llama(), TEXTS, level="head"), "heads are aligned"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        call()  # type: ignore[operator]
