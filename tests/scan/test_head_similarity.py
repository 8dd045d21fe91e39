"""Similarity of heads against dense maps in float64, within and between models."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from headwise import scan
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from headwise.scan.head_similarity import METHODS, draw, head_similarity
from headwise.scan.units import Units, word_units
from tests.scan.models import bert, llama, tokenizer

TEXTS = ["It is a truth universally acknowledged, that a single man", "must be in want of a wife."]


def maps(opened: object, text: str) -> np.ndarray:
    """All maps of a tiny model, [head, query, key]."""
    with attend(opened, readings=[Map()]) as run, torch.no_grad():
        opened.model(**opened.encode(text))
    seen = run.tree["text"]["map"].isel(sample=0).transpose("layer", "head", "query", "key").values
    return seen.reshape(-1, *seen.shape[2:]).astype(float)


def reference(a: np.ndarray, b: np.ndarray, method: str) -> float:
    """One pair of heads over the maps of several inputs, as the module says it."""
    if method == "fro":
        return 1 - np.mean([np.linalg.norm(x - y) for x, y in zip(a, b, strict=True)])
    rows = [(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)]
    if method == "js":
        return 1 - np.mean([jensenshannon(p, q) ** 2 for p, q in rows])
    total = []
    for p, q in rows:
        both = (p != 0) & (q != 0) if method == "pearson_nz" else np.ones(len(p), bool)
        p, q = p[both], q[both]
        flat = len(p) < 2 or p.std() < 1e-12 or q.std() < 1e-12
        total.append(0.0 if flat else np.corrcoef(p, q)[0, 1])
    return float(np.mean(total))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("make", [llama, bert])
def test_all_pairs_equal_the_dense_reference(make: object, method: str) -> None:
    opened = make()
    dense = [maps(opened, text) for text in TEXTS]
    found = head_similarity(opened, opened, TEXTS, method, queries="all").values.reshape(8, 8)
    expected = [[reference([d[i] for d in dense], [d[j] for d in dense], method) for j in range(8)] for i in range(8)]
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_head_is_like_itself(method: str) -> None:
    found = head_similarity(bert(), bert(), TEXTS, method, queries="all")
    own = found.values.reshape(8, 8).diagonal()
    np.testing.assert_allclose(own, 1, atol=1e-3 if method == "fro" else 1e-6)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = llama()
    whole = head_similarity(opened, opened, TEXTS, queries="all")
    monkeypatch.setattr("headwise.scan.maps.BLOCK", 3)
    np.testing.assert_allclose(head_similarity(opened, opened, TEXTS, queries="all"), whole, atol=1e-6)


def test_no_more_than_a_block_of_rows_is_ever_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(self: Map) -> None:
        original(self)
        seen.append(len(self.queries))

    original = Map.__post_init__
    monkeypatch.setattr(Map, "__post_init__", watched)
    monkeypatch.setattr("headwise.scan.maps.BLOCK", 4)
    head_similarity(llama(), llama(), [" ".join(["truth man wife"] * 7)], queries="all")
    assert max(seen) == 4


def test_sampled_rows_are_rows_of_the_whole() -> None:
    opened = llama()
    text = " ".join(TEXTS)
    some = head_similarity(opened, opened, [text], queries=5, seed=3)
    rows = draw(len(opened.encode(text)["input_ids"][0]), 5, 3)
    assert len(rows) == 5
    dense = maps(opened, text)[:, rows]
    np.testing.assert_allclose(some.values.reshape(8, 8)[1, 6], reference([dense[1]], [dense[6]], "js"), atol=1e-5)


def test_two_models_are_compared_by_words() -> None:
    one, other = llama(), bert()
    other.tokenizer = tokenizer(words=5)  # most words are unknown to it
    found = head_similarity(one, other, TEXTS, "js", unit="word", queries="all")
    assert found.dims == ("layer_a", "head_a", "layer_b", "head_b")
    assert ((found >= 1 - np.log(2) - 1e-6) & (found <= 1 + 1e-6)).all()
    with pytest.raises(HeadwiseError, match="unit='word'"):
        head_similarity(one, other, TEXTS)
    mirrored = head_similarity(other, one, TEXTS, "js", unit="word", queries="all")
    np.testing.assert_allclose(mirrored.transpose(*found.dims[2:], *found.dims[:2]), found, atol=1e-6)


def test_layers_match_by_their_best_heads() -> None:
    opened = llama()
    found = scan.layer_matches(head_similarity(opened, opened, TEXTS))
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-6)
    assert found.dims == ("layer_a", "layer_b")


def test_words_take_the_sum_of_keys_and_the_mean_of_queries() -> None:
    units = Units(torch.tensor([-1, 0, 0, 1, -1]), 2)
    a = torch.rand(5, 5).softmax(-1)
    words = units.means(units.sums(a))
    torch.testing.assert_close(words[0, 0], a[1:3, 1:3].sum(1).mean())
    torch.testing.assert_close(words[0, 1], a[1:3, 3].mean())
    torch.testing.assert_close(words[1, 0], a[3, 1:3].sum())
    whole = Units(torch.tensor([0, 1, 1, 2, 2]), 3)
    torch.testing.assert_close(whole.means(whole.sums(a)).sum(-1), torch.ones(3))


def test_words_of_a_text_are_found_in_any_tokenizer() -> None:
    text = "truth man, wife"
    assert word_units(bert(), text, [(0, 5), (6, 10), (11, 15)]).of.tolist() == [0, 1, 1, 2]
    assert word_units(bert(), text, [(6, 9), (11, 15)]).of.tolist() == [-1, 0, -1, 1]
    with pytest.raises(HeadwiseError, match="no token of its own for the word 'n'"):
        word_units(bert(), text, [(6, 8), (8, 9)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "cosine"}, "method"),
        ({"inputs": "a text"}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"queries": 0}, "queries"),
        ({"unit": "sentence"}, "unit"),
        ({"unit": "word", "inputs": [torch.tensor([[3, 4, 5]])]}, "words"),
        ({"stream": "audio"}, "stream"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    opened = llama()
    with pytest.raises(HeadwiseError, match=message):
        head_similarity(**{"model_a": opened, "model_b": opened, "inputs": TEXTS} | change)
