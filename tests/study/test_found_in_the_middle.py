"""Studies of the attention by place: on numbers made by hand they tell both verdicts, and they run on a model."""

import numpy as np
import pytest
from tests.scan.models import llama

from headwise.study import found_in_the_middle as studied
from headwise.study.found_in_the_middle import Seen, middle


def given(monkeypatch, bias: list[float], gold: float) -> None:
    """Attention that is this term of the place, plus `gold` for the right document."""

    def look(opened, examples):
        rng = np.random.default_rng(0)
        noise = [0.01 * rng.normal(size=(2, 8)) for _ in examples]
        return [
            Seen(e, np.array(bias) + gold * np.eye(8)[e.place] + n[0], np.array(bias) + n[1])
            for e, n in zip(examples, noise, strict=True)
        ]

    monkeypatch.setattr(studied, "look", look)


def test_the_gold_document_stands_in_the_middle() -> None:
    examples = middle(3, 8)
    assert len(examples) == 8
    assert {e.place for e in examples} == {2, 3, 4, 5}
    before, docs, after = studied.parts(examples[0])
    assert "\n\n".join([before, *docs, after]) == examples[0].prompt


@pytest.mark.parametrize(("edge", "verdict"), [(3.0, "holds"), (1.0, "fails")])
def test_a_bias_of_places_is_told_from_none(monkeypatch, edge: float, verdict: str) -> None:
    given(monkeypatch, [edge, 1, 1, 1, 1, 1, 1, edge], 0.0)
    found = studied.position_bias(llama())
    assert found.verdict == verdict
    assert found.measured["u_index"] == pytest.approx(edge, rel=0.02)
    assert found.measured["u_index_places_shuffled"] == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize(("bias", "verdict"), [([3, 2, 1, 1, 1, 1, 2, 3], "holds"), ([1.0] * 8, "fails")])
def test_calibration_finds_the_gold_document_where_places_hide_it(monkeypatch, bias: list[float], verdict: str) -> None:
    given(monkeypatch, bias, 0.5)
    found = studied.calibrated_relevance(llama())
    assert found.measured["recall"]["calibrated"] == 1
    assert found.verdict == verdict  # without a bias plain attention finds it as well: nothing rises


def test_the_studies_run_on_a_model() -> None:
    opened = llama()
    found = studied.found_in_the_middle(opened, seeds=(0,), count=2, calibration=2)
    assert found.measured["prompts"] == 2
    assert found.measured["temperature"] in studied.TEMPERATURES
    assert found.measured["perplexity"]["plain"] != found.measured["perplexity"]["calibrated"]
    assert len(studied.position_bias(opened, seeds=(0, 1), count=2).measured["curve"]) == 8
    assert studied.calibrated_relevance(opened, seeds=(0,), count=2).measured["prompts"] == 2
