"""Retrieval heads over contexts and depths, with a model whose answers and heads are known."""

import numpy as np
import pytest
import xarray as xr

from headwise import HeadPattern, scan
from headwise.errors import HeadwiseError
from headwise.scan import retrieval
from headwise.scan.needles import answer, prefill
from headwise.scan.retrieval import RetrievalHeads, highest, stability
from tests.scan.models import llama

GRID = RetrievalHeads(needles=scan.NEEDLES[:2], contexts=(60, 90), depths=2, kept_min=1)


@pytest.fixture
def scripted(monkeypatch):
    """Every question is answered right but those at the start of 60 tokens. Head 1 looks at the very token of the
    answer, head 2 at it in 90 tokens only, head 0 at the first token and head 3 at the token behind the right one. The
    second most attended key is the right one for heads 0 and 1."""

    def told(opened, hidden, state, max_new, edits=(), top=1):
        start, stop = hidden.answer
        right = np.arange(start, stop)
        first = np.zeros_like(right)
        best = np.stack([first, right, right if hidden.context == 90 else first, right + 1])
        second = np.stack([right, right, first, first])
        tops = np.broadcast_to(np.stack([best, second], -1)[None, ..., :top], (2, 4, len(right), top))
        found = 0.2 if (hidden.context, hidden.depth) == (60, 0.0) else 1.0
        dims = ("layer", "head", "step", "rank")
        placed = xr.DataArray(tops, dims=dims, coords={"layer": range(2), "head": range(4)})
        return found, hidden.ids[0, start:stop].tolist(), placed

    monkeypatch.setattr(retrieval, "answer", told)
    monkeypatch.setattr(retrieval, "prefill", lambda opened, hidden: None)


def test_scores_map_recall_and_stability(scripted) -> None:
    result = scan.heads(llama(), questions=[GRID])
    table = result.heads[result.heads["layer"] == 0]
    np.testing.assert_allclose(table["retrieval_heads"], [0, 1, 4 / 6, 0])
    data = result.data.sel(stream="text")
    assert data["retrieval_recall"].sel(context=60).values.tolist() == [pytest.approx(0.2), 1]
    cells = data["retrieval_map"].isel(layer=0)
    assert cells.sel(context=60, depth=0.0).isnull().all(), "an instance that is not answered is no evidence"
    assert cells.sel(context=60, depth=1.0).values.tolist() == [0, 1, 0, 0]
    assert cells.sel(context=90, depth=0.0).values.tolist() == [0, 1, 1, 0]
    between = data["retrieval_stability"].sel(context=60, context_other=90).item()
    assert between == pytest.approx(np.corrcoef([2, 4, 2, 2], [1.5, 3.5, 3.5, 1.5])[0, 1])


def test_the_pattern_is_shared_as_a_file(scripted, tmp_path) -> None:
    result = scan.heads(llama(), questions=[GRID])
    path = result.pattern("retrieval_heads").save(tmp_path / "retrieval.json")
    assert HeadPattern.load(path).pairs(above=0.9) == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"topk": 2}, [1, 1, 4 / 6, 0]),
        ({"exclude_first": True}, [1, 1, 4 / 6, 0]),
        ({"match": "text"}, [0, 1, 4 / 6, 0]),
    ],
)
def test_what_counts_as_a_hit_can_be_widened(scripted, options: dict, expected: list[float]) -> None:
    asked = RetrievalHeads(needles=GRID.needles, contexts=GRID.contexts, depths=2, kept_min=1, **options)
    found = scan.heads(llama(), questions=[asked]).heads
    np.testing.assert_allclose(found[found["layer"] == 0]["retrieval_heads"], expected)


def test_text_matches_across_case_and_leading_space() -> None:
    top = np.array([[[2, 3]]])
    plain = retrieval.hits(top, [7, 8], [0, 0, 5, 8], 2, 4, "set")
    texts = retrieval.hits(top, ["silver", "lantern"], ["a", "b", "silver", "lantern"], 2, 4, "set")
    assert (plain.item(), texts.item()) == (0.5, 1)


def test_the_first_token_is_passed_over() -> None:
    places = np.array([[0, 5, 6], [4, 0, 6]])
    np.testing.assert_array_equal(highest(places, 2, True), [[5, 6], [4, 6]])
    np.testing.assert_array_equal(highest(places, 2, False), [[0, 5], [4, 0]])


def test_stability_is_the_correlation_of_ranks() -> None:
    scores = np.array([[0.0, 0.1, 0.5, 0.9], [0.0, 0.2, 0.3, 0.4], [1.0, 0.9, 0.2, 0.0]]).T[None]
    found = stability(xr.DataArray(scores, dims=("layer", "head", "context"), coords={"context": [1, 2, 3]}))
    np.testing.assert_allclose(found, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])


def test_more_keys_are_read_in_the_order_of_their_weight() -> None:
    opened = llama()
    question = RetrievalHeads(contexts=(60,), depths=1, needles=scan.NEEDLES[:1], max_new=2)
    (hidden,) = question.instances(opened)
    one = answer(opened, hidden, prefill(opened, hidden), 2)[2]
    three = answer(opened, hidden, prefill(opened, hidden), 2, top=3)[2]
    assert three.dims == ("layer", "head", "step", "rank")
    assert three.sizes["rank"] == 3
    np.testing.assert_array_equal(one.isel(rank=0), three.isel(rank=0))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"match": "word"}, "match=.*'token' or 'text'"), ({"span": "all"}, "span="), ({"topk": 0}, "topk=1")],
)
def test_bad_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        RetrievalHeads(**options)
