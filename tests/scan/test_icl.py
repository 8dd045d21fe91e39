"""The in-context-learning score against plain loops."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.attention import HeadGain, attend
from headwise.errors import HeadwiseError
from headwise.scan.icl import IclScore
from tests.scan.models import bert, circuit, llama


def test_the_score_is_a_difference_of_losses() -> None:
    opened = llama()
    ids = torch.randint(3, 100, (5, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chance = opened.model(input_ids=ids).logits.double().log_softmax(-1)

    def loss(text: int, place: int) -> float:
        """Of the token at a place counted from 1."""
        return -float(chance[text, place - 2, ids[text, place - 1]])

    single = scan.icl_score(opened, ids, early=2, late=30, batch=2)
    np.testing.assert_allclose(single.per_text, [loss(t, 30) - loss(t, 2) for t in range(5)], atol=1e-4)
    mean = scan.icl_score(opened, ids, early=(5, 7), late=(30, 40))
    expected = [
        np.mean([loss(t, p) for p in range(30, 41)]) - np.mean([loss(t, p) for p in (5, 6, 7)]) for t in range(5)
    ]
    np.testing.assert_allclose(mean.per_text, expected, atol=1e-4)
    assert mean.score == pytest.approx(np.mean(expected), abs=1e-4)
    assert mean.sem == pytest.approx(np.std(expected, ddof=1) / np.sqrt(5), abs=1e-4)
    np.testing.assert_allclose(mean.loss[0], np.mean([loss(t, 2) for t in range(5)]), atol=1e-4)


def test_an_induction_circuit_learns_from_a_repetition_and_not_without_its_head() -> None:
    opened = circuit(positions=60)
    first = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:30] + 3
    ids = torch.cat([first, first])[None]
    assert scan.icl_score(opened, ids, early=(5, 25), late=(35, 55)).score < -0.5
    with attend(opened, edits=[HeadGain(heads=[(1, 0)], gain=0.0)]):
        assert scan.icl_score(opened, ids, early=(5, 25), late=(35, 55)).score == pytest.approx(0, abs=1e-5)


def test_texts_are_cut_and_the_slope_is_per_log_of_the_place() -> None:
    opened = llama()
    words = "it is a truth universally acknowledged that a single man in possession of a good fortune " * 2
    assert len(scan.icl_score(opened, [words, words], early=3, late=12).loss) == 11
    place = np.arange(2, 300)
    curve = IclScore(np.zeros(1), 5 - 0.4 * np.log(place))
    np.testing.assert_allclose(curve.slope, -0.4, atol=1e-9)
    assert np.isnan(curve.sem)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: scan.icl_score(llama(), ["a man"], late=50, early=5), "number 0 has"),
        (lambda: scan.icl_score(llama(), [], late=50, early=5), "at least one"),
        (lambda: scan.icl_score(llama(), ["a"], early=1, late=5), "early"),
        (lambda: scan.icl_score(llama(), ["a"], early=3, late=(9, 5)), "late"),
        (lambda: scan.icl_score(bert(), ["a man"], early=3, late=5), "language model"),
    ],
)
def test_bad_input_is_named(make: object, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        make()  # type: ignore[operator]
