"""`headwise swap`: the list, and a bench of the smallest kind in two processes."""

import json

from headwise import swap

SMALL = ("--tasks", "relations", "--seeds", 1, "--steps", 2, "--dim", 16, "--layers", 1)


def test_list_names_every_mechanism_with_its_paper(headwise_cli):
    rows = json.loads(headwise_cli("swap", "list", "--json").out)
    assert [row["mechanism"] for row in rows] == list(swap.MECHANISMS)
    assert all(row["what"] and row["paper"]["arxiv"] for row in rows)
    assert {row["causal"] for row in rows} <= {True, False}
    assert "attention" in headwise_cli("swap", "list").out


def test_bench_prints_keeps_draws_and_goes_on(headwise_cli, tmp_path):
    out, page = tmp_path / "bench.json", tmp_path / "curves.html"
    said = headwise_cli("swap", "bench", "--mechanisms", "attention:score=Cosine", *SMALL, "--out", out, "--plot", page)
    assert said.code == 0, said.err
    assert "relations: whether an object has a twin" in said.out
    assert "2 runs of 2 steps: about" in said.err
    stored = json.loads(out.read_text())
    assert stored["command"].startswith("headwise swap bench")
    assert len(stored["runs"]) == 2
    assert "<svg" in page.read_text()
    asked = ("--mechanisms", "attention:qk_norm=true", *SMALL, "--out", out, "--resume", "--json")
    rows = json.loads(headwise_cli("swap", "bench", *asked).out)
    assert [row["mechanism"] for row in rows] == ["attention", "attention:qk_norm=true", "attention:score=Cosine"]


def test_mistakes_are_told_in_a_sentence(headwise_cli, tmp_path):
    for asked, said in (
        (("--mechanisms", "magic"), "mechanisms: one of attention"),
        (("--tasks", "chess"), "tasks: of lm"),
        (("--plot", tmp_path / "curves.gif"), "ends in .html"),
        (("--out", tmp_path / "nowhere" / "bench.json"), "does not exist"),
    ):
        answer = headwise_cli("swap", "bench", *asked)
        assert answer.code == 2
        assert said in answer.err


def test_a_bench_of_which_nothing_was_trained_has_failed(headwise_cli):
    answer = headwise_cli("swap", "bench", "--mechanisms", "attention", *SMALL[:-4], "--dim", 16, "--lr", "1e30")
    assert answer.code == 1
