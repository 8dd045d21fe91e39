"""The studies of ZeroTuning on a small random model."""

import numpy as np
import pytest
import torch
from tests.scan.models import llama

from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.scan.needles import haystack
from headwise.steer import ZeroTuning
from headwise.study import first_token_gain as study
from headwise.study import first_token_leverage as leverage
from headwise.study.evaluate import perplexity


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


@pytest.mark.parametrize("task", study.TASKS)
def test_a_task_has_every_sentence_once_and_its_gold_among_the_labels(task: str) -> None:
    examples = study.TASKS[task](0)
    assert len({e.prompt for e in examples}) == len(examples) >= 24 + 64
    assert [e.prompt for e in examples] != [e.prompt for e in study.TASKS[task](1)]
    assert all(0 <= e.gold < len(e.options) for e in examples)


def test_accuracy_is_compared_on_sentences_not_tuned_on(opened: Opened) -> None:
    found = study.zero_tuning_accuracy(opened, seeds=[0], calibration=4, held_out=6, grid=(0.5, 1.0, 2.0), draws=1)
    assert found.measured["examples"] == 12
    assert set(found.measured["change"]) == {"tuned", "all_heads", "by_gradient", "random_0"}
    for row in found.measured["tasks"]:
        assert len(row["heads"]) == 2, "half of four head numbers"
        assert row["gain"] in (0.5, 1.0, 2.0)
    with pytest.raises(HeadwiseError, match="held_out"):
        study.zero_tuning_accuracy(opened, calibration=4, held_out=2000)


def test_random_heads_are_others(opened: Opened) -> None:
    tuned = ZeroTuning(heads=((0, 1), (1, 1), (0, 2), (1, 2)))
    assert {head for _, head in study.other_numbers(opened, tuned, 0)} == {0, 3}


def test_entropy_and_accuracy_are_of_the_same_gains(opened: Opened) -> None:
    found = study.zero_tuning_entropy(opened, seeds=[0], examples=5, grid=(0.5, 1.0, 2.0))
    for row in found.measured["tasks"]:
        assert len(row["accuracy"]) == len(row["entropy"]) == 3
        plain = np.mean(study.answers(opened, study.TASKS[row["task"]](0)[:5], [])[:, 0])
        assert row["accuracy_plain"] == pytest.approx(plain)
    prose = found.measured["perplexity"]
    assert (
        prose["first token"][1] == prose["second token"][1] == pytest.approx(perplexity(opened, haystack(), (), 128, 3))
    )
    assert prose["first token"][2] != prose["second token"][2]


def test_a_flat_curve_has_no_rank() -> None:
    rising, flat = np.arange(4.0), np.ones(4)
    assert study.rank(rising, flat) == 0
    assert study.rank(rising, -(rising**3)) == pytest.approx(-1)


def test_leverage_measures_every_part() -> None:
    opened = llama(num_hidden_layers=3)
    found = leverage.zero_tuning_leverage(opened, texts=3, length=6)
    assert set(found.measured["kl"]["2"]) == {"first", "others", "early", "middle", "late"}
    assert found.measured["kl"]["2"]["first"] > 0
    assert set(found.measured["perplexity"]["2"]) == {"first", "second", "early", "middle", "late"}
    assert found.measured["perplexity"]["2"]["first"] != found.measured["perplexity"]["plain"]
    ids = leverage.windows(opened, 3, 6)
    same = leverage.ends(opened, ids, [leverage.TokenScale(gain=1.0)])
    assert torch.equal(same, leverage.ends(opened, ids, [])), "a gain of 1 is the plain model"


def test_the_interval_of_a_known_change() -> None:
    change = np.random.default_rng(0).normal(1.0, 0.5, (400, 1))
    mean, low, high = study.interval(change)
    assert mean[0] == pytest.approx(change.mean())
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)
