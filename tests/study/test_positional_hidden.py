"""The study of positional hidden scaling, small, and its parts."""

import numpy as np
import pytest
from tests.scan.models import llama

from headwise import steer
from headwise.study.positional_hidden import DEPTHS, answers, lists, on_answer, positional_hidden_scaling, spread_change


def test_lists_hold_the_key_asked_for_at_its_depth() -> None:
    made = lists(3, 2, items=9)
    assert [e.place for e in made] == [*range(DEPTHS)] * 2
    for example in made:
        lines = example.prompt.splitlines()
        start, stop = example.spans["gold"]
        assert lines[2 * example.place] == example.prompt[start:stop]
        assert lines[-1] + example.options[example.gold] == example.prompt[start:stop]
    assert made == lists(3, 2, items=9)
    assert made != lists(4, 2, items=9)


def test_the_change_of_a_spread() -> None:
    places = np.repeat(np.arange(3), 20)
    noise = np.random.default_rng(0).normal(0, 0.01, 60)
    before, after = places + noise, 0.5 * places + noise
    found = spread_change(after, before, places)
    assert found["mean"] == pytest.approx(-1.0, abs=0.02)
    assert found["low"] < found["mean"] < found["high"] < -0.9
    assert spread_change(before, before, places) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_answers_and_mass_change_under_the_method_only() -> None:
    opened, made = llama(), lists(0, 1, items=5)
    method = steer.PositionalHiddenScaling(3, factor=-2.0, layers=(0, 1))
    assert (answers(opened, made) != answers(opened, made, method)).all()
    assert (on_answer(opened, made, method) != on_answer(opened, made, method, method)).all()
    neutral = steer.PositionalHiddenScaling(3, factor=1.0, layers=(0, 1))
    assert (on_answer(opened, made, method) == on_answer(opened, made, method, neutral)).all()


def test_the_study_runs() -> None:
    opened = llama(num_hidden_layers=6)
    found = positional_hidden_scaling(
        opened, seeds=(0,), per_depth=2, calibration=1, items=5, samples=4, length=60, skip=12, smooth_skip=12, topk=2
    )
    assert found.verdict in ("holds", "fails")
    assert found.measured["channel"] in found.measured["candidates"]
    assert len(found.measured["logp_by_depth"]["plain"]) == DEPTHS


def test_a_model_without_such_channels_is_no_test() -> None:
    opened = llama(num_hidden_layers=6, hidden_size=16)
    found = positional_hidden_scaling(opened, samples=4, length=60, skip=12, smooth_skip=12)
    assert found.verdict == "untestable"
