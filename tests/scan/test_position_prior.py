"""What position explains: slow references by loops, fixed maps and maps of content as limits, and one head's edges."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.scan.position_prior import PositionPrior, divergences, edge_posterior, even, place_prior
from headwise.scan.tokens import random_tokens
from headwise.study.position_prior import left, position_prior
from tests.scan.models import bert, circuit, llama
from tests.scan.test_mixing import eager


def random_maps(texts: int, heads: int, n: int, causal: bool = True) -> np.ndarray:
    scores = np.random.default_rng(0).normal(size=(texts, heads, n, n)) * 2
    if causal:
        scores[..., np.triu(np.ones((n, n), bool), 1)] = -np.inf
    e = np.exp(scores)
    return e / e.sum(-1, keepdims=True)


def slow(maps: np.ndarray, rows: list[int]) -> dict:
    """By loops over texts, heads and rows, from the whole maps of one layer."""
    texts, heads = maps.shape[:2]
    n = maps.shape[-1]
    found = {name: np.zeros(heads) for name in ("place", "offset", "uniform")}
    for t in range(texts):
        others = [u for u in range(texts) if u != t]
        for h in range(heads):
            lags: dict[int, list[float]] = {}
            for i in rows:
                for j in range(n):
                    if maps[:, :, i, j].max() > 0:
                        lags.setdefault(i - j, []).append(np.mean([maps[u, h, i, j] for u in others]))
            for i in rows:
                seen = [j for j in range(n) if maps[:, :, i, j].max() > 0]
                a = maps[t, h, i, seen]
                place = (sum(maps[u, h, i, seen] for u in others) + 1 / len(seen)) / texts
                near = np.array([np.mean(lags[i - j]) for j in seen])
                offset = ((texts - 1) * near / near.sum() + 1 / len(seen)) / texts
                for name, prior in (("place", place), ("offset", offset), ("uniform", 1 / len(seen))):
                    found[name][h] += (a * np.log(a / prior)).sum() / (texts * len(rows))
    return found


@pytest.mark.parametrize("causal", [True, False])
def test_divergences_are_those_of_slow_loops(causal: bool) -> None:
    maps = random_maps(4, 3, 9, causal)
    rows = [0, 2, 5, 8]
    found, wanted = divergences(maps[:, :, rows], rows), slow(maps, rows)
    for name, kl in wanted.items():
        np.testing.assert_allclose(found[name], kl, rtol=1e-10)


@pytest.mark.parametrize("make", [llama, bert])
def test_the_question_is_the_reference_of_eager_maps(make) -> None:
    opened = make()
    question = PositionPrior(sequences=3, length=20, rows=20)
    (prompt,) = question.prompts(opened)
    maps = eager(opened, prompt.inputs["input_ids"])
    found = scan.heads(opened, questions=[question]).data.sel(stream="text")
    for layer in range(2):
        wanted = slow(maps[layer], list(range(20)))
        np.testing.assert_allclose(found["position_kl"][layer], wanted["place"], atol=1e-5)
        for column, kind in (("position_prior", "place"), ("offset_prior", "offset")):
            left = (1 - found[column][layer]) * wanted["uniform"]  # the share itself is of nothing in a flat head
            np.testing.assert_allclose(left, wanted[kind], atol=1e-5)


def test_a_head_that_looks_one_back_is_explained_and_one_that_looks_for_tokens_is_not() -> None:
    opened = circuit()
    found = scan.heads(opened, questions=[PositionPrior(sequences=12, length=40, rows=40)]).data.sel(stream="text")
    share = found["position_prior"].values[:, 0]
    assert share[0] > 0.95
    assert found["offset_prior"].values[0, 0] > 0.9
    assert share[1] < 0.8


def test_uniform_heads_are_fixed_maps() -> None:
    opened = llama()
    with torch.no_grad():
        opened.model.model.layers[0].self_attn.q_proj.weight.zero_()
    data = scan.heads(opened, questions=[PositionPrior(sequences=3, length=20, rows=8)]).data.sel(stream="text")
    assert (data["position_prior"][0] == 1).all()
    np.testing.assert_allclose(data["position_kl"][0], 0, atol=1e-6)
    assert (data["position_kl"][1] > 0).all()


def test_maps_that_are_all_the_same_leave_what_the_uniform_one_adds() -> None:
    one = random_maps(1, 2, 6)
    maps = np.repeat(one, 1000, 0)
    assert divergences(maps, range(6))["place"].max() < 2e-3
    missing = np.concatenate([maps[:5], np.full((5, 1, 6, 6), np.nan)], 1)
    found = divergences(missing, range(6))["place"]
    assert np.isnan(found[2])
    assert np.isfinite(found[:2]).all()


def test_it_shares_its_pass_with_input_dependence() -> None:
    assert len(scan.plan(llama(), questions=["input_dependence", "position_prior"]).passes) == 1


@pytest.mark.parametrize("make", [llama, bert])
def test_edges_with_the_prior_divided_out(make) -> None:
    opened = make()
    ids = random_tokens(opened, 3, 12, seed=0)
    found = edge_posterior(opened, 1, 2, ids)
    maps = eager(opened, ids)[1][:, 2:3]
    np.testing.assert_allclose(found["posterior"], maps[:, 0], atol=1e-6)
    prior = place_prior(maps, even(maps))[:, 0]
    np.testing.assert_allclose(found["prior"], prior, atol=1e-6)
    np.testing.assert_allclose(found["prior"].sum("key"), 1, atol=1e-6)
    back = found["prior"] * np.exp(found["log_ratio"])
    np.testing.assert_allclose(back.fillna(0), maps[:, 0], atol=1e-6)
    assert bool(found["log_ratio"].isnull().any()) is (make is llama)


def test_edges_of_the_shipped_prose() -> None:
    assert dict(edge_posterior(llama(), 0, 0).sizes) == {"text": 8, "query": 128, "key": 128}


def test_bad_input_is_refused() -> None:
    with pytest.raises(HeadwiseError, match=r"PositionPrior\(sequences=...\) must be at least 2; got 1"):
        PositionPrior(sequences=1)
    with pytest.raises(HeadwiseError, match=r"ids: wanted two or more texts as \[text, token\]; got shape \(1, 5\)"):
        edge_posterior(llama(), 0, 0, torch.zeros(1, 5, dtype=torch.long))
    opened = llama()
    opened.tokenizer = None
    with pytest.raises(HeadwiseError, match="give ids"):
        edge_posterior(opened, 0, 0)


def test_the_study_knows_heads_of_position_from_heads_of_content() -> None:
    found = position_prior(circuit(), PositionPrior(sequences=6, length=30, rows=20))
    shares = found.measured["heads_mostly_explained"]
    assert shares["place"] == shares["distance"] == 0.5
    assert found.measured["own_prior_better_than_other_heads"] == 0, "a lone head is its own neighbour"
    assert found.measured["least_explained"][0][:2] == [1, 0]
    assert found.verdict == "fails"


def test_priors_of_the_study_are_held_out_and_sum_to_one() -> None:
    maps = random_maps(4, 3, 9)[:, :, 1:]
    found = left(maps, maps, np.arange(1, 9))
    np.testing.assert_allclose(found["shuffled"], found["place"])
    np.testing.assert_allclose(found["uniform"], slow(random_maps(4, 3, 9), list(range(1, 9)))["uniform"])
    assert (found["place_after_first"] < found["uniform_after_first"] + 1).all()
    assert not np.allclose(found["other_head"], found["place"])
