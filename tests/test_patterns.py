"""Head patterns: made by a scan, kept as a small JSON file, picked from, compared, refused where they don't fit."""

import json
import math

import pandas as pd
import pytest

from headwise import HeadPattern, HeadwiseError, scan
from headwise.attention import HeadGain
from headwise.patterns import HeadScore
from tests.scan.models import llama

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife."
SCORES = {("text", 0, 1): 0.5, ("text", 2, 0): 0.9, ("text", 1, 3): -0.25, ("audio", 0, 0): 0.7}


def made(scores: dict = SCORES, **changes) -> HeadPattern:
    heads = tuple(HeadScore(stream=s, layer=n, head=h, score=x) for (s, n, h), x in scores.items())
    return HeadPattern(**{"question": "sinks", "model": "m", "fingerprint": "f", "heads": heads} | changes)


def test_a_scan_makes_a_pattern_with_where_it_comes_from() -> None:
    opened = llama()
    found = scan.heads(opened, texts=[TEXT], questions=["sinks"], seed=3)
    pattern = found.pattern("sinks")
    assert len(pattern.heads) == 8
    assert (pattern.question, pattern.model, pattern.seed) == ("sinks", opened.name, 3)
    assert pattern.paper["arxiv"] == "2410.10781"
    assert {"headwise", "torch", "transformers"} == set(pattern.versions)
    pattern.check(opened.fingerprint, opened.name)
    best = found.top("sinks", 3)
    assert pattern.pairs(3) == list(zip(best["layer"], best["head"], strict=True))
    HeadGain(heads=pattern.pairs(2), gain=0.0)


def test_heads_without_a_score_are_left_out() -> None:
    found = scan.heads(llama(), texts=[TEXT], questions=["sinks"])
    found.data["sinks"][0, 1, 2] = math.nan
    pattern = found.pattern("sinks")
    assert len(pattern.heads) == 7
    assert (1, 2) not in pattern.pairs()


def test_the_file_gives_back_the_same_pattern(tmp_path) -> None:
    pattern = made(paper={"title": "T", "arxiv": "1"}, seed=5, versions={"torch": "2"})
    path = pattern.save(tmp_path / "sinks.json")
    assert HeadPattern.load(path) == pattern
    assert json.loads(path.read_text())["format"] == "headwise head pattern 1"
    assert path.stat().st_size < 1200
    assert pattern.save(path) == path
    assert list(tmp_path.iterdir()) == [path], "a file is replaced, nothing is left beside it"


def test_pairs_are_the_highest_of_one_stream() -> None:
    pattern = made()
    assert pattern.pairs(stream="text") == [(2, 0), (0, 1), (1, 3)]
    assert pattern.pairs(2, stream="text") == [(2, 0), (0, 1)]
    assert pattern.pairs(above=0.5, stream="text") == [(2, 0), (0, 1)], "a score of the bound itself counts"
    assert pattern.pairs(9, stream="audio") == [(0, 0)]
    assert pattern.highest == 0.9
    assert made({}).table.empty
    assert math.isnan(made({}).highest)


def test_equal_scores_keep_their_order() -> None:
    assert made({("text", 1, 0): 0.5, ("text", 0, 0): 0.5, ("text", 2, 0): 0.5}).pairs() == [(1, 0), (0, 0), (2, 0)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "heads of text, audio; name one"),
        ({"stream": "vision"}, "got 'vision'"),
        ({"stream": "text", "n": 0}, "n: wanted at least 1"),
        ({"stream": "text", "above": 2}, "no head of sinks has 2; the highest is 0.9"),
    ],
)
def test_what_cannot_be_picked_is_said(asked: dict, said: str) -> None:
    with pytest.raises(HeadwiseError, match=said):
        made().pairs(**asked)


def test_an_empty_pattern_has_no_pairs() -> None:
    with pytest.raises(HeadwiseError, match="no heads"):
        made({}).pairs()


def test_the_difference_has_the_largest_change_first_and_keeps_heads_of_one_side() -> None:
    one = made({("text", 0, 0): 0.1, ("text", 0, 1): 0.2, ("text", 0, 2): 0.3})
    other = made({("text", 0, 0): 0.2, ("text", 0, 1): -0.6, ("text", 1, 0): 1.0})
    table = one.diff(other)
    assert table[["layer", "head"]].values.tolist()[:2] == [[0, 1], [0, 0]]
    assert table["change"][0] == pytest.approx(-0.8)
    assert table["change"][1] == pytest.approx(0.1)
    assert table["change"].isna().sum() == 2
    pd.testing.assert_series_equal(one.diff(one)["change"], pd.Series([0.0] * 3, name="change"))


def test_another_model_is_refused() -> None:
    with pytest.raises(HeadwiseError, match=r"found in m \(f\), not in other \(g\)"):
        made().check("g", "other")


BROKEN = {
    "no JSON": "heads:",
    "another format": '{"format": "headwise head pattern 2"}',
    "a list": "[]",
    "a head too much": json.dumps(made().model_dump() | {"extra": 1}),
    "no number": json.dumps(made().model_dump() | {"heads": [{"stream": "t", "layer": 0, "head": 0, "score": "x"}]}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_pattern_is_refused(kind: str, tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(BROKEN[kind])
    with pytest.raises(HeadwiseError, match="not a head pattern"):
        HeadPattern.load(path)


def test_files_that_cannot_be_used_are_named(tmp_path) -> None:
    with pytest.raises(HeadwiseError, match="cannot be read"):
        HeadPattern.load(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(HeadwiseError, match="not a head pattern"):
        HeadPattern.load(tmp_path / "bytes.json")
    with pytest.raises(HeadwiseError, match=r"\.json"):
        made().save(tmp_path / "a.txt")
