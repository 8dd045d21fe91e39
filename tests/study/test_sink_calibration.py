"""The study of ACT on a small random model."""

import random

import numpy as np
import pytest
from tests.scan.models import llama

from headwise.models import Opened
from headwise.steer import ACT
from headwise.study import sink_calibration as study
from headwise.study.tasks import Example

WORDS = "the family was so much pleased with house and large garden of man girls wife".split()


def guesses(seed: int, count: int) -> list[Example]:
    """Words that the small model knows."""
    draw = random.Random(seed)
    return [Example(" ".join(draw.choices(WORDS, k=20)), (" him", " her"), n % 2) for n in range(count)]


SETTING = ACT(threshold=0.05, min_queries=2)


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama(num_hidden_layers=4)


def test_every_set_of_heads_is_measured(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TASKS", {"guesses": guesses, "others": lambda seed, n: guesses(seed + 9, n)})
    found = study.act_accuracy(opened, seeds=[0], calibration=3, held_out=4, draws=1, method=SETTING)
    assert set(found.measured["change"]) == {"chosen", "all", "random_0"}
    assert found.measured["examples"] == 8
    for row in found.measured["tasks"]:
        assert 1 <= row["heads"] <= 4, "only one layer of four may be changed"
        assert row["examples_with_sinks"] > 0


@pytest.mark.parametrize("task", study.TASKS)
def test_prompts_have_their_shots(task: str) -> None:
    for example in study.TASKS[task](0, 3):
        assert example.prompt.count("\n\n") == study.SHOTS


def test_random_heads_are_as_many_others(opened: Opened) -> None:
    act = ACT(heads=[(layer, head) for layer in (1, 2) for head in range(4)])
    chosen = [(2, 0), (2, 1), (2, 3)]
    found = study.drawn(opened, act, chosen, 0)
    assert len(set(found)) == 3
    assert not set(found) & set(chosen)
    assert (2, 2) in found, "the layer's own first"


def test_sinks_of_other_heads_change_nothing(opened: Opened) -> None:
    [example] = guesses(0, 1)
    found = study.answers(opened, SETTING, example, {"none": [(0, 0)], "all": SETTING.chosen(opened)})
    assert found["none"] == found["plain"]
    assert found["all"] != found["plain"]
    ready = SETTING.prepare(opened, opened.encode(example.prompt))
    assert found["all"] == study.scored(opened, example, ready)


def test_no_strength_leaves_prose_as_it_was(opened: Opened) -> None:
    assert study.prose_change(opened, ACT(beta=1.0), texts=2, length=24) == 0
    assert abs(np.asarray(study.prose_change(opened, SETTING, texts=2, length=24))) > 0
