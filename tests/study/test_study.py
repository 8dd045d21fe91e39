"""The core of the studies, on one small study that lives here."""

import json

import numpy as np
import pytest

from headwise import HeadwiseError, Paper
from headwise.study import Finding, registry, study

PAPER = Paper("A Paper That Was Never Written", "0000.00000")


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Studies of this test only, and a place of its own for their findings."""
    registry.studies()  # a module registers once, when it is first imported: into the register that stays
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(registry, "evidence", lambda: tmp_path)
    monkeypatch.setattr(registry, "_shelves", lambda: [tmp_path])
    return tmp_path


@pytest.fixture
def coin(shelf):
    @study("coin_is_fair", paper=PAPER, room="scan", claim="A coin shows heads half the time.")
    def coin_is_fair(seeds=(0, 1), bias=0.5):
        share = np.mean([np.random.default_rng(seed).random(1000) < bias for seed in seeds])
        verdict = "holds" if abs(share - 0.5) < 0.05 else "fails"
        return Finding({"share": share}, "a share of 0.45 to 0.55", verdict, f"the share is {share:.2f}", seeds=seeds)

    return coin_is_fair


def test_a_study_is_unrun_then_run_and_remembered(coin, shelf):
    row = registry.get("coin_is_fair").row()
    assert row == {
        "name": "coin_is_fair",
        "paper": {"title": PAPER.title, "arxiv": PAPER.arxiv},
        "room": "scan",
        "claim": "A coin shows heads half the time.",
        "verdict": "unrun",
        "measured": None,
    }
    finding = registry.run("coin_is_fair")
    assert (finding.verdict, finding.seeds, finding.command) == ("holds", [0, 1], "headwise study run coin_is_fair")
    assert finding.hardware
    assert {"headwise", "torch", "python"} <= finding.versions.keys()
    stored = json.loads((shelf / "coin_is_fair.json").read_text())
    assert stored["measured"] == {"share": pytest.approx(0.5, abs=0.05)}
    assert registry.get("coin_is_fair").row()["verdict"] == "holds"
    assert registry.get("coin_is_fair").finding == finding


def test_a_failing_claim_stays(coin, shelf):
    registry.run("coin_is_fair", bias=0.9)
    assert registry.get("coin_is_fair").row()["verdict"] == "fails"


def test_a_run_that_breaks_leaves_the_last_finding(coin, shelf):
    before = registry.run("coin_is_fair")
    with pytest.raises(TypeError):
        registry.run("coin_is_fair", colour="red")
    assert registry.get("coin_is_fair").finding == before
    assert [path.name for path in shelf.iterdir()] == ["coin_is_fair.json"]


def test_a_damaged_finding_says_what_to_do(coin, shelf):
    (shelf / "coin_is_fair.json").write_text('{"measured": ')
    with pytest.raises(HeadwiseError, match="run the study again"):
        registry.get("coin_is_fair").row()


def test_two_studies_of_one_name_are_refused(coin):
    def other():
        return None

    other.__module__ = "elsewhere"
    with pytest.raises(HeadwiseError, match="already registered"):
        study("coin_is_fair", paper=PAPER, room="scan", claim="")(other)


def test_the_registry_refuses_what_does_not_fit(shelf):
    with pytest.raises(HeadwiseError, match="room"):
        study("a_name", paper=PAPER, room="kitchen", claim="")
    with pytest.raises(HeadwiseError, match="snake_case"):
        study("A Name", paper=PAPER, room="scan", claim="")
    with pytest.raises(HeadwiseError, match="none called 'nothing'"):
        registry.get("nothing")


def test_a_finding_is_plain_json(tmp_path):
    measured = {
        "array": np.arange(3),
        "half": np.float32(0.5),
        "missing": float("nan"),
        "nested": {"ok": np.bool_(True)},
    }
    finding = Finding(measured, "x", "untestable", "no model")
    assert finding.measured == {"array": [0, 1, 2], "half": 0.5, "missing": None, "nested": {"ok": True}}
    finding.save(tmp_path / "x.json")
    assert Finding.load(tmp_path / "x.json") == finding
    with pytest.raises(HeadwiseError, match="verdict"):
        Finding({}, "", "maybe", "who knows")
    with pytest.raises(HeadwiseError, match="one sentence"):
        Finding({}, "", "fails", "")
    with pytest.raises(HeadwiseError, match="got object"):
        Finding({"thing": object()}, "", "holds", "why not")


def test_every_study_of_the_package_registers_and_its_finding_reads():
    for each in registry.studies():
        assert each.claim
        assert each.paper.title
        assert each.row()["verdict"] in ("holds", "fails", "untestable", "unrun")


def test_the_command_line_runs_and_shows_a_study(coin, shelf, monkeypatch, capsys):
    import headwise.cli

    def cli(*arguments):
        monkeypatch.setattr("sys.argv", ["headwise", "study", *arguments])
        with pytest.raises(SystemExit) as left:
            headwise.cli.main()
        return left.value.code or 0, capsys.readouterr().out

    monkeypatch.setattr(headwise.study.registry, "studies", lambda: list(registry._REGISTERED.values()))
    assert "unrun" in cli("show", "coin_is_fair")[1]
    code, printed = cli("run", "coin_is_fair")
    assert code == 0
    assert "holds" in printed
    assert "the share is" in cli("show", "coin_is_fair")[1]
    code, printed = cli("show", "nothing")
    assert code == 2
