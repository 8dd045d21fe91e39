"""Every command on a tiny model: what it prints, which files it leaves, and how it refuses."""

import json
import subprocess
import sys

import pytest

import headwise.scan
from headwise.errors import HeadwiseError


@pytest.fixture
def page(tmp_path):
    """A text of 30 words the tiny tokenizer knows."""
    path = tmp_path / "page.txt"
    path.write_text("the cat sat on a mat and the dog saw the cat " * 2 + "it was tired because of the log")
    return path


def test_help_is_quick_and_complete(headwise_cli):
    said = headwise_cli("--help")
    assert said.code == 0
    assert all(command in said.out for command in ("scan", "doctor", "models", "patterns", "study"))


def test_help_does_not_load_what_only_the_commands_need():
    heavy = "('torch', 'numpy', 'transformers', 'pandas', 'headwise.scan')"
    source = f"import sys, headwise.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scan_prints_a_table_and_writes_both_files(headwise_cli, tiny, page, tmp_path):
    report, numbers = tmp_path / "report.html", tmp_path / "scan.nc"
    said = headwise_cli("scan", tiny, "--text", page, "--out", report, "--save", numbers)
    assert said.code == 0, said.err
    assert "First-token sinks" in said.out
    assert "Roles:" in said.out
    assert "<html" in report.read_text().lower()
    assert len(headwise.scan.Scan.load(numbers).heads) == 8
    assert "in 1 pass over 31 tokens, about" in said.err  # the cost, told before the work


def test_scan_as_json_is_one_row_a_head(headwise_cli, tiny, page):
    said = headwise_cli("scan", tiny, "--text", page, "--questions", "sinks,entropy", "--json")
    rows = json.loads(said.out)
    assert len(rows) == 8
    assert {"stream", "layer", "head", "role", "sinks", "entropy"} <= rows[0].keys()


def test_scan_reads_the_shipped_text_cut_to_what_fits(headwise_cli, tiny):
    said = headwise_cli("scan", tiny, "--questions", "sinks", "--queries", 8)
    assert said.code == 0, said.err


def test_scan_twice_gives_the_same_numbers(headwise_cli, tiny, page):
    asked = ("scan", tiny, "--text", page, "--questions", "entropy", "--queries", 5, "--json", "--seed", 3)
    assert headwise_cli(*asked).out == headwise_cli(*asked).out


def test_the_report_says_the_command_as_it_was_given(headwise_cli, tiny, page, tmp_path):
    report = tmp_path / "the report.html"
    said = headwise_cli("scan", tiny, "--text", page, "--questions", "entropy", "--out", report)
    assert said.code == 0, said.err
    assert f"headwise scan {tiny} --text {page} --questions entropy --out '{report}'" in report.read_text()


def test_a_scan_of_all_says_its_cost_first_and_what_it_left_out(headwise_cli, tiny, page, tmp_path, monkeypatch):
    monkeypatch.setattr(headwise.scan.run, "QUESTIONS", headwise.scan.CORE)
    said = headwise_cli(
        "scan", tiny, "--text", page, "--all", "--pattern", f"sinks={tmp_path / 'sinks.json'}", "--json"
    )
    assert said.code == 0, said.err
    first = said.err.strip().splitlines()[0]
    assert "4 questions of" in first
    assert "in 1 pass over" in first
    assert "not asked: retrieval_heads: " in said.err
    rows = json.loads(said.out)
    pattern = headwise.HeadPattern.load(tmp_path / "sinks.json")
    best = max(rows, key=lambda row: row["sinks"])
    assert pattern.pairs(1) == [(best["layer"], best["head"])]


def test_a_stopped_scan_is_resumed(headwise_cli, tiny, page, tmp_path, monkeypatch):
    asked = ("scan", tiny, "--text", page, "--text", page, "--questions", "entropy", "--json")
    whole, half = headwise_cli(*asked), tmp_path / "half.nc"
    run, done = headwise.scan.passes.Pass.run, []

    def stopping(self, *arguments):
        if len(done) == 1:
            raise HeadwiseError("stopped")
        done.append(self)
        return run(self, *arguments)

    monkeypatch.setattr(headwise.scan.passes.Pass, "run", stopping)
    assert headwise_cli(*asked, "--resume", half).code == 2
    assert half.exists()
    monkeypatch.setattr(headwise.scan.passes.Pass, "run", lambda self, *a: done.append(self) or run(self, *a))
    said = headwise_cli(*asked, "--resume", half)
    assert said.out == whole.out
    assert len(done) == 2, "the first pass was not made again"
    assert not half.exists()


def test_compare_prints_a_table_and_writes_a_page(headwise_cli, tiny, page, tmp_path):
    report, numbers = tmp_path / "both.html", tmp_path / "one.nc"
    asked = ("--text", page, "--questions", "sinks,entropy")
    said = headwise_cli("scan", "--compare", tiny, tiny, *asked, "--out", report)
    assert said.code == 0, said.err
    assert "First-token" in said.out
    assert "similarity 1.000 at the same place" in " ".join(said.out.split())
    assert "Same role: 8 of 8 heads." in said.out
    assert "First-token sinks: change" in report.read_text()
    headwise_cli("scan", tiny, *asked, "--save", numbers)
    found = json.loads(headwise_cli("scan", "--compare", numbers, tiny, *asked, "--json").out)
    assert {"column", "mean", "mean_other", "spearman"} <= set(found["columns"][0])
    assert len(found["heads"]) == 8
    assert all(row["sinks_change"] == 0 and row["similarity"] is None for row in found["heads"])


def test_patterns_are_shown_and_compared(headwise_cli, tiny, page, tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    short = tmp_path / "short.txt"
    short.write_text("the dog saw the cat")
    for name, text in ((one, page), (other, short)):
        asked = ("--text", text, "--questions", "sinks", "--pattern", f"sinks={name}")
        assert f"wrote {name}" in headwise_cli("scan", tiny, *asked).out
    said = headwise_cli("patterns", "show", one, "--top", 3)
    assert said.out.startswith("sinks of 8 heads in ")
    assert len([line for line in said.out.splitlines() if ".H" in line]) == 3
    assert json.loads(headwise_cli("patterns", "show", one, "--json").out) == json.loads(one.read_text())
    said = headwise_cli("patterns", "diff", one, other)
    assert "over 8 shared heads" in said.out
    rows = json.loads(headwise_cli("patterns", "diff", one, other, "--json").out)
    assert all(row["change"] == pytest.approx(row["score_other"] - row["score"]) for row in rows)
    assert headwise_cli("patterns", "show", page).code == 2


BAD = {
    "a file that is not there": (["--text", "missing.txt"], "missing.txt"),
    "an empty file": (["--text", "empty.txt"], "empty.txt is empty"),
    "no text at all": (["--text", "binary.bin"], "not UTF-8"),
    "too long": (["--text", "long.txt"], "64 positions"),
    "an unknown question": (["--questions", "sinks,beauty"], "'beauty'"),
    "a folder that is not there": (["--out", "no/where/report.html"], "does not exist"),
    "a format nobody knows": (["--save", "scan.xls"], ".nc"),
    "all and some": (["--all", "--questions", "sinks"], "one of the two"),
    "a pattern without a file": (["--pattern", "sinks"], "COLUMN=FILE.json"),
    "a pattern of no column": (["--pattern", "sink_shares=a.json"], "there are sink_share"),
    "a pattern of what is not asked": (["--questions", "entropy", "--pattern", "sinks=a.json"], "no such column"),
    "numbers of two scans": (["--compare", "a", "b", "--save", "scan.nc"], "one scan"),
    "a checkpoint that is none": (["--questions", "entropy", "--text", "page.txt", "--resume", "page.txt"], "page.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_no_file(case, headwise_cli, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "long.txt").write_text("the cat sat " * 100)
    (tmp_path / "page.txt").write_text("the cat sat on a mat")
    before = sorted(tmp_path.iterdir())
    arguments, told = BAD[case]
    said = headwise_cli("scan", tiny, "--out", "report.html", *arguments)
    assert said.code == 2
    assert told in said.err
    assert said.err.strip().splitlines()[-1].startswith("headwise: ")
    assert "Traceback" not in said.err
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_nobody_knows(headwise_cli, tmp_path):
    said = headwise_cli("scan", tmp_path / "nothing")
    assert said.code == 2
    assert "Traceback" not in said.err
    said = headwise_cli("doctor", "zoo:unicorn")
    assert said.code == 2
    assert "zoo:unicorn" in said.err


def test_a_scan_that_breaks_leaves_the_old_report(headwise_cli, tiny, page, tmp_path, monkeypatch):
    report = tmp_path / "report.html"
    report.write_text("the old one")

    def half(self, path):
        path.write_text("half a")
        raise HeadwiseError("out: the disk is full.")

    monkeypatch.setattr(headwise.scan.Scan, "to_html", half)
    said = headwise_cli("scan", tiny, "--text", page, "--questions", "sinks", "--out", report)
    assert said.code == 2
    assert report.read_text() == "the old one"
    assert sorted(tmp_path.iterdir()) == [page, report]


def test_doctor_reaches_every_layer(headwise_cli, tiny):
    said = headwise_cli("doctor", tiny)
    assert said.code == 0, said.err
    assert "2 of 2 attention layers reached" in said.out
    rows = json.loads(headwise_cli("doctor", tiny, "--json").out)
    assert [(row["layer"], row["status"], row["heads"], row["kv_heads"]) for row in rows] == [
        (0, "reached", 4, 2),
        (1, "reached", 4, 2),
    ]


def test_models_lists_the_zoo(headwise_cli):
    assert headwise_cli("models").out == headwise_cli("models", "list").out
    names = [row["name"] for row in json.loads(headwise_cli("models", "list", "--json").out)]
    assert names == ["zoo:llm", "zoo:encoder", "zoo:vit", "zoo:speech"]
    assert headwise_cli("models", "pull", "unicorn").code == 2
