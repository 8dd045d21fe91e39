"""The basin studies on a small random model, and their arithmetic on masses made by hand."""

import numpy as np
import pytest
import torch
from tests.scan.models import llama

from headwise.scan.basin import AttentionBasin
from headwise.study import basin
from headwise.study.basin import Seen, basin_answer, basin_profile, interval, measure, ratio

SMALL = AttentionBasin(slots=4, shuffles=8)


def given(monkeypatch, edges: float, answer: float) -> None:
    """Masses with a basin of this edge ratio, and answers that follow the slots' mean mass by this factor."""
    rng = np.random.default_rng(0)
    mean = np.array([edges, 1.0, 0.9, edges])
    mass = mean + 0.01 * rng.normal(size=(80, 6, 4))
    gold = np.arange(80) % 4
    seen = Seen(mass, gold, answer * mean[gold] + 0.01 * rng.normal(size=80))
    monkeypatch.setattr(basin, "measure", lambda opened, question: seen)


@pytest.mark.parametrize(("edges", "verdict"), [(2.0, "holds"), (1.0, "fails")])
def test_the_profile_study_tells_a_basin_from_a_flat_profile(monkeypatch, edges: float, verdict: str) -> None:
    given(monkeypatch, edges, 1.0)
    found = basin_profile(llama(), SMALL)
    assert found.verdict == verdict
    assert found.measured["edge_ratio"] == pytest.approx(edges / 0.95, rel=0.01)
    assert found.measured["edge_ratio_slots_shuffled"] == pytest.approx(1, abs=0.15)
    assert found.measured["layers_with_a_basin"] == (list(range(6)) if verdict == "holds" else [])


@pytest.mark.parametrize(("answer", "verdict"), [(1.0, "holds"), (-1.0, "fails")])
def test_the_answer_study_tells_the_sign(monkeypatch, answer: float, verdict: str) -> None:
    given(monkeypatch, 2.0, answer)
    found = basin_answer(llama(), SMALL)
    assert found.verdict == verdict
    assert found.measured["correlation"] == pytest.approx(answer, abs=0.01)


def test_the_answers_log_probability_is_that_of_its_last_word() -> None:
    opened = llama()
    seen = measure(opened, SMALL)
    assert seen.mass.shape == (8, 2, 4)
    assert seen.gold.tolist() == [0, 1, 2, 3] * 2
    shelf = SMALL.shelf(0)
    before, word = shelf.answer.rsplit(" ", 1)
    ids = SMALL.prompt(opened, shelf, before).inputs["input_ids"]
    with torch.no_grad():
        chances = opened.model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert seen.answer[0] == pytest.approx(chances[opened.tokenizer.convert_tokens_to_ids(word)].item(), abs=1e-4)


def test_both_studies_run_on_a_model() -> None:
    opened = llama()
    assert len(basin_profile(opened, SMALL).measured["profile"]) == 4
    assert len(basin_answer(opened, SMALL).measured["log_probability"]) == 4


def test_the_interval_holds_the_statistic() -> None:
    mass = np.random.default_rng(0).uniform(0.5, 1.5, size=(40, 5))
    low, high = interval(mass, seed=0)
    assert low < ratio(mass) < high
