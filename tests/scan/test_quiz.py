"""Heads of answers and names: exact on weights made by hand; the prompts are balanced and found again among tokens."""

import math

import numpy as np
import pytest
import xarray as xr

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.models import open_model
from headwise.scan import quiz
from headwise.scan.name_movers import NameMovers
from headwise.scan.options import NegativeHeads, OptionHeads, nas
from headwise.scan.question import Prompt
from tests.scan.models import bert, llama


def at(rows: list) -> xr.Dataset:
    """Weights [query, target] of one head, as the reading gives them."""
    return xr.Dataset({"at": (("sample", "layer", "head", "query", "target"), np.array([[[rows]]], dtype=float))})


@pytest.mark.parametrize(
    ("weights", "mass", "constant", "correct"),
    [
        ([0.25, 0.25, 0.25, 0.25], 1, 1, 0),
        ([0, 0, 1, 0], 1, 0, 1),
        ([1, 0, 0, 0], 1, 0, -1 / 3),
        ([0.1, 0.1, 0.1, 0.1], 0.4, 0.4, 0),
        ([0, 0, 0, 0], 0, 0, 0),
    ],
)
def test_option_scores_of_ideal_heads(weights: list, mass: float, constant: float, correct: float) -> None:
    found = OptionHeads().reduce(at([weights]), Prompt({}, own={"right": 2}))
    got = [found[name].item() for name in ("mass", "constant", "correct")]
    np.testing.assert_allclose(got, [mass, constant, correct], atol=1e-12)


def test_one_letter_always_is_told_from_the_right_letter() -> None:
    for kind, expected in (("always A", 1.0), ("right", 0.25)):
        rows = [np.eye(4)[0 if kind == "always A" else right] for right in range(4)]
        parts = [OptionHeads().reduce(at([row]), Prompt({}, own={"right": n})) for n, row in enumerate(rows)]
        letters = sum(part["letters"] for part in parts) / 4
        assert letters.max("letter").item() == expected


def test_nas_is_nothing_for_equals_and_turns_its_sign() -> None:
    yes, no = (xr.DataArray(x, dims="query") for x in ([0.2, 0.1], [0.2, 0.4]))
    assert nas(yes, yes).item() == 0
    assert nas(yes, no).item() == pytest.approx(0.5 * math.log(4), rel=1e-6)
    assert nas(no, yes).item() == pytest.approx(-nas(yes, no).item())
    assert np.isfinite(nas(xr.zeros_like(yes), no)).all()


def test_name_movers_of_ideal_heads() -> None:
    second, end = [1, 0, 0], [0.7, 0.1, 0.2]
    found = NameMovers().reduce(at([second, end]), Prompt({}))
    got = [found[name].item() for name in ("mover", "inhibition", "duplicate")]
    np.testing.assert_allclose(got, [0.6, 0.2, 1])


@pytest.mark.parametrize("kind", ["choices", "yes_or_no", "gifts"])
def test_prompts_are_found_again_among_the_tokens(kind: str) -> None:
    opened = llama(max_position_embeddings=128)
    prompts = getattr(quiz, kind)(opened, 8, 0)
    again = getattr(quiz, kind)(opened, 8, 0)
    assert all((a.inputs["input_ids"] == b.inputs["input_ids"]).all() for a, b in zip(prompts, again, strict=True))
    for prompt in prompts:
        places = prompt.own["places"]
        assert 0 <= min(places.values()) <= max(places.values()) < prompt.length
        assert len(set(places.values())) == len(places)


def test_prompts_are_balanced() -> None:
    opened = llama()
    assert [p.own["right"] for p in quiz.choices(opened, 8, 0)] == [0, 1, 2, 3] * 2
    asked = [(p.own["right"], p.own["places"]["yes"] < p.own["places"]["no"]) for p in quiz.yes_or_no(opened, 8, 0)]
    assert sorted(asked) == sorted([(w, first) for w in ("yes", "no") for first in (True, False)] * 2)
    order = [p.own["places"]["io"] < p.own["places"]["s1"] for p in quiz.gifts(opened, 8, 0)]
    assert sum(order) == 4
    assert all(p.own["receiver"] != p.own["giver"] for p in quiz.gifts(opened, 8, 1))


def test_places_are_the_last_tokens_of_their_parts() -> None:
    opened = llama()
    made = quiz.prompt(opened, [("It is a truth", "start"), (" universally", None), (" acknowledged", "end")], {})
    assert made.own["places"] == {"start": 3, "end": 5}


@pytest.mark.parametrize("question", [OptionHeads(4), NegativeHeads(4), NameMovers(4)])
def test_the_questions_score_every_head(question: scan.Question) -> None:
    found = scan.heads(llama(), questions=[question]).heads
    for column in question.columns():
        assert found[column.name].notna().all()
    with pytest.raises(HeadwiseError, match="language model"):
        scan.heads(bert(), questions=[question])


@pytest.mark.parametrize("make", [lambda: OptionHeads(6), lambda: NegativeHeads(3), lambda: NameMovers(0)])
def test_numbers_that_cannot_be_balanced_are_refused(make) -> None:
    with pytest.raises(HeadwiseError, match="prompts_asked"):
        make()


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    opened = open_model(llama().model)
    assert "fast tokenizer" in quiz.lacks(opened)
