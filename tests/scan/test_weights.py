"""Rank of the scores, selection, effective beta, unselectable keys, uniform queries: against slow references."""

from math import comb

import numpy as np
import pytest
import torch
from torch import nn

from headwise import scan
from headwise.attention import Inputs, Map, attend
from headwise.errors import HeadwiseError
from headwise.scan.effective_beta import correlation
from headwise.scan.question import Prompt
from headwise.scan.score_rank import construct, effective_rank, log_rank, rank_of, singular_values
from headwise.scan.sdm import (
    beta_table,
    fit_beta,
    log_cap_intersection,
    log_intersection,
    radius_of_beta,
    scaled_radius,
)
from headwise.scan.selection import critical_top, expected_distance, selection, softmax_jacobian_norm
from headwise.scan.uniform_query import folded_angles
from headwise.scan.unselectable import around_norms
from tests.scan.models import bert, llama

TEXT = (
    "It is a truth universally acknowledged that a single man in possession of a good fortune must be in want of a wife"
)


def read(opened, *readings):
    """What one plain forward over the text shows, as the tree's text node."""
    with attend(opened, list(readings)) as run, torch.no_grad():
        opened.model(**opened.encode(TEXT))
    return run.tree["text"]


# -- rank of the scores --


def test_singular_values_are_those_of_the_dense_centred_scores() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(40, 6, generator=draw, dtype=torch.float64) for _ in "qk")
    scores = q @ k.T
    dense = torch.linalg.svdvals(scores - scores.mean(-1, keepdim=True))[:6]
    centred = k - k.mean(0)
    torch.testing.assert_close(singular_values(q.T @ q, centred.T @ centred), dense)


def test_the_question_sees_the_rank_of_a_real_call() -> None:
    opened = llama()
    found = scan.heads(opened, texts=[TEXT], questions=[scan.ScoreRank(tol=0.9)]).heads
    seen = read(opened, Inputs(("q", "k")))
    for row in found.itertuples():
        q, k = (
            torch.tensor(seen[f"input_{w}"].sel(layer=row.layer, head=row.head).squeeze().values).double() for w in "qk"
        )
        scores = q @ k.T
        values = torch.linalg.svdvals(scores - scores.mean(-1, keepdim=True))
        assert row.score_rank == rank_of(values, 0.9)
        assert row.score_rank_entropy == pytest.approx(effective_rank(values).item(), rel=1e-3)
        assert row.query_rank == rank_of(torch.linalg.svdvals(q), 0.9)
        assert row.key_rank == rank_of(torch.linalg.svdvals(k - k.mean(0)), 0.9)


def test_ranks_of_limit_cases() -> None:
    assert rank_of(torch.tensor([[3.0, 0, 0], [1, 1, 1], [0, 0, 0]]), 0.99).tolist() == [1, 3, 0]
    torch.testing.assert_close(
        effective_rank(torch.tensor([[3.0, 0, 0], [1, 1, 1], [0, 0, 0]])), torch.tensor([1.0, 3, 0])
    )


def test_the_closed_form_makes_any_pattern() -> None:
    target = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(9), size=9))
    x = torch.randn(9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w_q, w_k = construct(target, x)
    torch.testing.assert_close(torch.softmax(x @ w_q @ (x @ w_k).T / 3, -1), target)
    assert log_rank(target) == 8, "softmax ignores one dimension"
    assert log_rank(torch.softmax(torch.randn(9, 2).double() @ torch.randn(2, 9).double(), -1)) == 2


# -- selection --


def slow_selection(alpha, x, n):
    keys = [j for j in range(len(alpha)) if alpha[j] > 0]
    if len(keys) <= n:
        return None
    y = {j: alpha[j] * x[j] for j in keys}
    chosen = sorted(keys, key=lambda j: -alpha[j])[:n]
    s = sum(y[j] for j in chosen)
    d = {j: (y[j] - s).norm().item() for j in keys}
    others = [d[j] for j in keys if j not in chosen]
    near, far = min(others), max(d[j] for j in chosen)
    return {
        "distance_sum": sum(others),
        "distance_mean": sum(others) / len(others),
        "separable": sum(d[j] < near for j in chosen) / n,
        "precision": n / (n + sum(o <= far for o in others)),
    }


@pytest.mark.parametrize("n", [1, 3, 8])
def test_selection_is_the_slow_one(n: int) -> None:
    draw = torch.Generator().manual_seed(0)
    alpha = torch.softmax(2 * torch.randn(2, 5, 10, generator=draw, dtype=torch.float64), -1)
    alpha[0, 0, 4:] = 0
    x = torch.randn(2, 10, 3, generator=draw, dtype=torch.float64)
    found = selection(alpha, x, n)
    for batch in range(2):
        for row in range(5):
            slow = slow_selection(alpha[batch, row], x[batch], n)
            for name, value in found.items():
                got = value[batch, row].item()
                assert np.isnan(got) if slow is None else got == pytest.approx(slow[name]), name
    if n == 1:
        assert (found["separable"] == 1).all()


def test_the_question_is_selection_of_the_maps_rows() -> None:
    opened = llama()
    question = scan.SelectionCapacity(n=2, top=(1, 2), queries=100, row_min=10)
    found = scan.heads(opened, texts=[TEXT], questions=[question])
    seen = read(opened, Map(), Inputs(("v",)))
    site = {"layer": 1, "head": 3}
    alpha = torch.tensor(seen["map"].sel(site).squeeze().values)[9:].double()
    v = torch.tensor(seen["input_v"].sel(site).squeeze().values).double()
    slow = [slow_selection(a, v, 2) for a in alpha]
    row = found.heads.set_index(["layer", "head"]).loc[(1, 3)]
    assert row["selection_capacity"] == pytest.approx(np.mean([s["separable"] for s in slow]))
    assert row["selection_precision"] == pytest.approx(np.mean([s["precision"] for s in slow]))
    rest = [slow_selection(a[1:], v[1:], 2)["separable"] for a in alpha]
    assert row["selection_capacity_rest"] == pytest.approx(np.mean(rest))
    assert row["effective_tokens"] == pytest.approx(torch.special.entr(alpha).sum(-1).exp().mean().item(), rel=1e-4)
    assert row["softmax_jacobian"] == pytest.approx(softmax_jacobian_norm(alpha).mean().item(), rel=1e-4)
    curve = found.data["selection_curve_distance_sum"].sel(stream="text", top=2, **site).item()
    assert curve == pytest.approx(np.mean([s["distance_sum"] for s in slow]), rel=1e-4)


def test_contributions_through_the_output_matrix() -> None:
    kinds = [scan.SelectionCapacity(vectors=v, row_min=9) for v in ("value", "value_o")]
    made = [scan.heads(llama(), texts=[TEXT], questions=[kind]) for kind in kinds]
    a, b = (m.data["selection_curve_distance_sum"].values for m in made)
    assert not np.allclose(a, b, equal_nan=True)


def test_the_jacobian_norm_is_the_dense_one_and_bounded() -> None:
    draw = torch.Generator().manual_seed(0)
    alpha = torch.softmax(
        torch.tensor([0.1, 1, 3, 10])[:, None, None] * torch.randn(4, 20, 7, generator=draw), -1
    ).double()
    dense = torch.diag_embed(alpha) - alpha[..., None] * alpha[..., None, :]
    torch.testing.assert_close(softmax_jacobian_norm(alpha, 0.3), torch.linalg.matrix_norm(dense, 2) / 0.3)
    limits = torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(softmax_jacobian_norm(limits, 2.0), torch.tensor([0.25, 0, 0.125]).double())


def test_the_expected_distance_is_the_mean_over_draws() -> None:
    draw = torch.Generator().manual_seed(0)
    alpha, x = torch.rand(6, generator=draw), torch.randn(6, 2, generator=draw)
    y = alpha[:, None] * x
    found = []
    for _ in range(20_000):
        order = torch.randperm(6, generator=draw)
        found.append((y[order[:2]].sum(0) - y[order[2]]).square().sum().item())
    assert expected_distance(alpha, x, 2) == pytest.approx(np.mean(found), rel=0.03)


def test_the_critical_number_is_the_first_to_fall() -> None:
    assert critical_top(np.array([1.0, 2, 1.5, 0.9]), np.array([1, 2, 5, 10])) == 10
    assert critical_top(np.array([1.0, 2, 1.5]), np.array([1, 2, 5])) is None


# -- distributed memory --


@pytest.mark.parametrize(("n", "d"), [(10, 0), (10, 3), (13, 5), (20, 9), (20, 14)])
def test_both_formulas_of_the_overlap_agree(n: int, d: int) -> None:
    def choose(a: int, b: int) -> int:
        return comb(a, b) if b >= 0 else 0

    ball = sum(comb(n, k) for k in range(d + 1))
    odd = [choose(m - 1, (m - 1) // 2) * choose(n - m, d - (m - 1) // 2) for m in range(1, n + 1)]
    fast = [ball - sum(odd[:v:2]) for v in range(n + 1)]
    found = np.exp(log_intersection(n, d))
    np.testing.assert_allclose(found, fast, rtol=1e-9, atol=1e-9)
    assert found[0] == pytest.approx(ball)
    assert (found[2 * d + 1 :] == 0).all()
    assert sum(comb(n, v) * x for v, x in enumerate(found)) == pytest.approx(ball**2), "sum over all centres"


def test_the_overlap_is_what_counting_finds() -> None:
    places = np.array(np.meshgrid(*[[0, 1]] * 10)).reshape(10, -1).T
    near = places.sum(1) <= 3
    for v in range(11):
        other = np.array([1] * v + [0] * (10 - v))
        both = near & ((places != other).sum(1) <= 3)
        assert np.exp(log_intersection(10, 3))[v] == pytest.approx(both.sum(), abs=1e-6)


def test_fitted_betas_and_their_inverse() -> None:
    assert [round(fit_beta(64, d)[0], 1) for d in (5, 11, 15, 20)] == [28.4, 14.4, 9.4, 5.3]
    assert [round(fit_beta(64, d)[2], 3) for d in (5, 11, 15, 20)] == [0.887, 0.972, 0.984, 0.988]
    assert fit_beta(64, 11, reference_beta=True)[0] == pytest.approx(15.85, abs=0.01)
    assert all(np.diff(beta_table(64)) <= 0)
    found = radius_of_beta(64, [fit_beta(64, 11)[0], 1e9, 1e-9, np.nan])
    np.testing.assert_allclose(found, [11, 2, 32, np.nan])
    assert scaled_radius(11, 64, 64) == 11


def test_caps_of_a_sphere_overlap_as_points_drawn_on_it_say() -> None:
    n, d = 6, 2
    points = np.random.default_rng(0).normal(size=(200_000, n))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    least = 1 - 2 * d / n
    inside = points[:, 0] > least
    for cos in (0.8, 0.3):
        other = np.zeros(n)
        other[:2] = cos, np.sqrt(1 - cos**2)
        share = (inside & (points @ other > least)).sum() / inside.sum()
        made = np.exp(log_cap_intersection(n, d, np.array(cos)) - log_cap_intersection(n, d, np.array(1.0)))
        assert made == pytest.approx(share, abs=0.01)
    assert log_cap_intersection(n, d, np.array(-1.0)) == -np.inf


@pytest.mark.parametrize("reduce_over", ["mean", "max"])
def test_effective_beta_is_that_of_the_scores(reduce_over: str) -> None:
    opened = llama()
    found = scan.heads(opened, texts=[TEXT], questions=[scan.EffectiveBeta(reduce_over=reduce_over)]).heads
    seen = read(opened, Inputs(), Map())
    for row in found.itertuples():
        q, k, v = (seen[f"input_{w}"].sel(layer=row.layer, head=row.head).squeeze().values for w in "qkv")
        scores = q @ k.T / np.sqrt(8)
        scores[np.triu_indices(len(scores), 1)] = -np.inf
        assert row.effective_beta == pytest.approx(getattr(scores.max(-1), reduce_over)(), rel=1e-3)
        lengths = np.linalg.norm(k, axis=-1)
        asked = np.linalg.norm(q, axis=-1).mean() / np.sqrt(8)
        assert row.beta_max_key == pytest.approx(asked * lengths.max(), rel=1e-3)
        assert row.beta_mean_key == pytest.approx(asked * lengths.mean(), rel=1e-3)
        assert row.hamming_radius == pytest.approx(radius_of_beta(8, row.effective_beta), rel=1e-3)
        weights = seen["map"].sel(layer=row.layer, head=row.head).squeeze().values
        seen_by = np.arange(len(weights), 0, -1)
        expected = np.corrcoef(np.linalg.norm(v, axis=-1), weights.sum(0) / seen_by)[0, 1]
        assert row.value_norm_corr == pytest.approx(expected, abs=1e-3)


def test_correlation_where_something_is_unknown() -> None:
    x = np.array([[1.0, 2, 3, np.nan], [1, 1, 1, 1]])
    np.testing.assert_allclose(correlation(x, np.array([[2.0, 4, 6, 0], [1, 2, 3, 4]])), [1, np.nan])


# -- unselectable keys and uniform queries --


def test_only_corners_are_selectable() -> None:
    square = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1], [0.5, 0.5], [0.5, 0], [0, 0]])
    expected = [False, False, False, False, True, True, False]
    for method in ("reflect+lp", "lp"):
        assert scan.unselectable(square, method).tolist() == expected, "inside, on an edge, and a duplicate corner"
    assert scan.unselectable(torch.ones(3, 2)).tolist() == [False] * 3, "equal keys are one point"


def test_reflections_change_nothing_and_one_length_makes_all_selectable() -> None:
    draw = torch.Generator().manual_seed(0)
    for dim in (2, 4):
        points = torch.rand(30, dim, generator=draw)
        found = scan.unselectable(points)
        assert torch.equal(found, scan.unselectable(points, "lp"))
        assert found.any()
        assert not scan.unselectable(nn.functional.normalize(points - 0.5, dim=-1)).any()


def test_norms_make_tokens_selectable() -> None:
    found = scan.heads(bert(), texts=[TEXT], questions=[scan.UnselectableKeys(keys=64)])
    assert (found.data["unselectable_after"] == 0).all()
    assert found.heads["unselectable_keys"].between(0, 1).all()
    few = scan.UnselectableKeys(keys=4)
    assert few.rate(np.random.default_rng(0).normal(size=(50, 8))) == 0, "four points in eight dimensions are corners"
    assert np.isnan(few.rate(np.full((3, 2), np.nan)))


def test_a_uniform_query_has_angle_0_and_equal_scores() -> None:
    """Keys set so that the head asks along the inverse of the gain: all scores of a query are then equal."""
    opened = bert()
    site = opened.sites[1]
    norm = opened.model.encoder.layer[0].output.LayerNorm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 32))
        norm.bias.normal_(generator=torch.Generator().manual_seed(0))
        site.module.key.weight[:8] = torch.randn(8, 1) / norm.weight
    batch = opened.encode(TEXT)
    found = scan.heads(opened, inputs=[batch], questions=[scan.UniformQuery()]).heads
    angles = found.set_index(["layer", "head"])["uniform_query"]
    assert angles[1, 0] == pytest.approx(0, abs=0.1)
    assert angles[1, 1] > 20
    with attend(opened, [Inputs(("q", "k"))]) as run, torch.no_grad():
        opened.model(**batch)
    q, k = (run.tree["text"][f"input_{w}"].sel(layer=1, head=0).squeeze().values for w in "qk")
    scores = q @ k.T
    np.testing.assert_allclose(scores, scores[:, :1].repeat(scores.shape[1], 1), rtol=1e-3, atol=1e-4)


def test_angles_are_those_of_the_slow_formula() -> None:
    opened = bert()
    question, site = scan.UniformQuery(), opened.sites[0]
    prompt = Prompt(opened.encode(TEXT))
    tokens = around_norms(opened, prompt, "text")["after"][0]
    found = folded_angles(site, tokens, opened.model.embeddings.LayerNorm)
    x = tokens[0, 3].double()
    q = x @ site.W_Q[2].double() + site.b_Q[2].double()
    effective = site.W_K[2].double() @ q
    angle = np.degrees(np.arccos((effective.sum() / effective.norm() / 32**0.5).item()))
    assert found[0, 2, 3].item() == pytest.approx(90 - abs(angle - 90), abs=1e-2)
    assert question.name == "uniform_query"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: scan.ScoreRank(tol=1.0), "between 0 and 1; got 1.0"),
        (lambda: construct(torch.ones(3, 3) / 3, torch.ones(3, 5)), "3 linearly independent rows"),
        (lambda: construct(torch.eye(3), torch.eye(3)), "positive weights only"),
        (lambda: scan.SelectionCapacity(n=3), "n= to be one of top="),
        (lambda: scan.SelectionCapacity(vectors="key"), '"value" or "value_o"; got'),
        (lambda: softmax_jacobian_norm(torch.ones(2) / 2, 0), "above 0; got 0"),
        (lambda: expected_distance(torch.ones(3), torch.ones(3, 2), 3), "1 to 2 of 3 keys; got 3"),
        (lambda: scan.EffectiveBeta(reduce_over="sum"), '"mean" or "max"; got'),
        (lambda: fit_beta(64, 1), "at least 2, for a line; got 1"),
        (lambda: log_intersection(10, 11), "0 <= d <= n; got n=10, d=11"),
        (lambda: log_cap_intersection(10, 5, np.array(0.5)), "below n/2 = 5; got 5"),
        (lambda: scan.UnselectableKeys(keys=1), "at least 2; got 1"),
        (lambda: scan.unselectable(torch.ones(3)), r"shape \[key, dim\]; got shape \(3,\)"),
        (lambda: scan.unselectable(torch.ones(3, 2), "simplex"), "reflect"),
        (lambda: scan.heads(llama(), texts=[TEXT], questions=["uniform_query"]), "needs a LayerNorm"),
    ],
)
def test_bad_input_is_named(call: object, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        call()  # type: ignore[operator]
