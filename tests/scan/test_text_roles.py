"""Roles of words: exact on attention made by hand, blind to habits of distance."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.scan.question import Prompt
from headwise.scan.text_roles import TextRoles, control, copies, is_word, rare, table, word_starts
from tests.scan.models import bert, llama

TEXT = "the cat saw the dog and the dog saw the cat while the cat and the dog saw the man"


def patterns(ids: list[int], words: list[bool]) -> tuple[dict, dict]:
    found = copies(ids, words)
    return found, control(found, len(ids), np.random.default_rng(0))


def summed(weights: np.ndarray, lags: dict[int, list[int]]) -> float:
    """The slow definition: mean over queries of the sum over their lags."""
    return float(np.mean([sum(weights[i, i - lag] for lag in some) for i, some in lags.items()]))


def test_copies_are_counted_back_and_only_words_count() -> None:
    assert copies([5, 9, 5, 9, 5], [True, False, True, False, True]) == {2: [2], 4: [4, 2]}
    assert len(copies([5] * 20, [True] * 20)[19]) == 8, "the last eight"


def test_pieces_follow_the_vocabularys_marks() -> None:
    words = [True] * 5
    assert word_starts(["un", "##believ", "##able", "cat", "##s"], words) == {1: [1], 2: [1, 2], 4: [1]}
    assert word_starts(["Ġun", "believ", "able", "Ġcat", "s"], words) == {1: [1], 2: [1, 2], 4: [1]}
    assert word_starts(["It", "is", "so"], [True] * 3) == {}, "a vocabulary of whole words marks nothing"
    assert word_starts(["Ġa", ",", "b"], [True, False, True]) == {}, "punctuation ends a word"


def test_words_are_letters_and_numbers() -> None:
    words = ("Ġcat", "##s", "▁don't", "1813")
    assert all(map(is_word, words))
    assert not any(map(is_word, (",", "Ċ", "ĊĊ", "<s>", None, "Ġ")))


def test_controls_look_back_as_far_and_find_no_pattern() -> None:
    ids = np.random.default_rng(1).integers(0, 12, 200).tolist()
    found, other = patterns(ids, [True] * 200)
    assert len(other) > 0.9 * len(found)
    assert sorted(map(tuple, other.values())) == sorted(map(tuple, other.values()))
    pairs = {(i, lag) for i, some in found.items() for lag in some}
    assert not pairs & {(i, lag) for i, some in other.items() for lag in some}
    assert all(i >= max(some) for i, some in other.items())


@pytest.mark.parametrize(("kind", "expected"), [("copier", 1.0), ("previous", 0.0), ("uniform", 0.0)])
def test_a_copier_scores_one_and_habits_of_distance_nothing(kind: str, expected: float) -> None:
    ids = np.random.default_rng(2).integers(0, 40, 400).tolist()
    n = len(ids)
    found, other = patterns(ids, [True] * n)
    weights = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    if kind == "previous":
        weights = np.eye(n, k=-1)
    if kind == "copier":
        for i, lags in found.items():
            weights[i] = 0
            weights[i, [i - lag for lag in lags]] = 1 / len(lags)
        for i in other:
            if i not in found:
                weights[i] = np.eye(n)[0]
    assert summed(weights, found) - summed(weights, other) == pytest.approx(expected, abs=0.05)


def test_the_question_equals_the_slow_definition() -> None:
    opened = llama()
    ids = opened.encode(TEXT)["input_ids"]
    scores = scan.heads(opened, texts=[TEXT], questions=[TextRoles()]).heads["repeated_token"]
    model = opened.model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(ids, output_attentions=True).attentions)[:, 0].numpy()
    pieces = opened.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    found = copies(ids[0].tolist(), [is_word(piece) for piece in pieces])
    other = control(found, ids.shape[1], np.random.default_rng(0))
    expected = [summed(w, found) - summed(w, other) for w in weights.reshape(-1, *weights.shape[-2:])]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_rare_words_have_as_many_neighbours() -> None:
    ids = [9, 1, 2, 8, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 1, 2, 3, 4]
    marks = rare(ids, [True] * len(ids))
    assert marks[:, 0].nonzero().flatten().tolist() == [0, 3]
    assert marks[:, 1].nonzero().flatten().tolist() == [1, 4]
    assert rare(ids[:9], [True] * 9) is None
    last = rare([1] * 9 + [9], [True] * 10)
    assert last.argmax(0).tolist() == [9, 8], "a rare last word has the free one before it beside it"


def test_tables_hold_keys() -> None:
    assert table({3: [1, 3]}, 4)[3].tolist() == [2, 0, *[-1] * 6]


def test_what_a_text_lacks_is_unknown_or_said() -> None:
    found = scan.heads(bert(), texts=[TEXT], questions=[TextRoles()]).heads
    assert "word_pieces" not in found
    assert found["repeated_token"].notna().all()
    with pytest.raises(HeadwiseError, match="nothing for it to read"):
        scan.heads(llama(), texts=["the cat saw a dog"], questions=[TextRoles()])
    with pytest.raises(HeadwiseError, match="one text at a time"):
        TextRoles().readings_at(llama(), Prompt({"input_ids": torch.ones(2, 3, dtype=torch.long)}))
