"""Which passes a plan has: questions about the same inputs share one, and one that fails does not stop the others."""

from dataclasses import dataclass

import pytest
import torch
import xarray as xr

from headwise import Paper, scan
from headwise.attention import Top
from headwise.errors import HeadwiseError
from headwise.scan import catalogue, run
from headwise.scan.costs import UNKNOWN, extra
from headwise.scan.passes import likeness
from headwise.scan.question import Prompt
from tests.scan.models import llama

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife."


@dataclass(frozen=True)
class Sharp(scan.Question):
    """Reads tokens of its own; the same seed makes the same ones."""

    seed: int = 0
    paper = Paper("A Title", "0000.00000")

    def prompts(self, opened):
        ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(self.seed))
        return [Prompt({"input_ids": ids}, own=type(self).__name__)]

    def readings_at(self, opened, prompt):
        assert prompt.own == type(self).__name__, "every question gets the prompt it made"
        return [Top(1, per="head")]

    def score(self, values):
        return values["top_value"].isel(rank=0)


class Blunt(Sharp):
    def score(self, values):
        return 1 - values["top_value"].isel(rank=0)


class Broken(Sharp):
    def reduce(self, values, prompt):
        raise HeadwiseError("Broken: the values are too small.")


class Refusing(Sharp):
    def readings_at(self, opened, prompt):
        raise HeadwiseError("Refusing: the text is too short.")


class Driving(scan.Question):
    drives = True
    asked = 0

    def observe(self, opened, prompt):
        Driving.asked += 1
        raise HeadwiseError("Driving: no such needle.")


def test_questions_with_the_same_inputs_share_a_pass() -> None:
    opened = llama()
    plan = scan.plan(opened, questions=[Sharp(), Blunt(), scan.CopyHeads(seeds=1)])
    alone = scan.plan(opened, questions=[Sharp(), Blunt(seed=1)])
    assert [q.name for q in plan.passes[0].questions] == ["sharp", "blunt"]
    assert len(plan.passes[0].readings) == 1
    assert len(alone.passes) == 2
    found = scan.heads(opened, questions=[Sharp(), Blunt()]).heads
    xr.testing.assert_allclose(xr.DataArray(found["sharp"]), xr.DataArray(1 - found["blunt"]))
    again = scan.heads(opened, questions=[Blunt()]).heads
    assert again["blunt"].tolist() == found["blunt"].tolist()


@dataclass(frozen=True)
class Wide(Sharp):
    """Gives the dims of `Sharp` another size."""

    def readings_at(self, opened, prompt):
        return [Top(3, per="head")]

    def score(self, values):
        assert values.sizes["rank"] == 3
        return values["top_value"].sum("rank")


def test_questions_may_give_a_dim_different_sizes() -> None:
    opened = llama()
    both = scan.heads(opened, questions=[Sharp(), Wide()]).heads
    assert (both["wide"] > both["sharp"]).all()
    assert both["wide"].tolist() == scan.heads(opened, questions=[Wide()]).heads["wide"].tolist()


def test_inputs_are_alike_only_with_the_same_ids_and_names() -> None:
    ids = torch.tensor([[1, 2, 3]])
    one = likeness(Prompt({"input_ids": ids}))
    assert one == likeness(Prompt({"input_ids": ids.clone()}, own=3))
    assert one != likeness(Prompt({"input_ids": ids[:, :2]}))
    assert one != likeness(Prompt({"input_ids": ids}, {"text": scan.run.Segments.positions(3)}))
    assert one != likeness(Prompt({"input_ids": ids, "attention_mask": torch.ones(1, 3)}))


def test_a_question_that_fails_is_left_out_of_a_scan_of_all(monkeypatch, tmp_path) -> None:
    kinds = (Sharp, Broken, Refusing, Driving, scan.Entropy)
    monkeypatch.setattr(run, "QUESTIONS", kinds)
    monkeypatch.setattr(catalogue, "QUESTIONS", kinds)
    found = scan.heads(llama(), texts=[TEXT, TEXT[:40]], questions="all")
    assert found.about["questions"] == ["sharp", "entropy"]
    assert found.left_out == {
        "broken": "Broken: the values are too small.",
        "refusing": "Refusing: the text is too short.",
        "driving": "Driving: no such needle.",
    }
    assert Driving.asked == 1, "what failed on one prompt is not tried on the next"
    for kind in (Broken, Refusing, Driving):
        with pytest.raises(HeadwiseError, match=kind.__name__):
            scan.heads(llama(), texts=[TEXT], questions=[kind()])


def test_the_cost_is_said_and_grows_with_the_questions(monkeypatch) -> None:
    monkeypatch.setattr("headwise.scan.costs.measured", lambda: {"entropy": 4.0})
    assert (extra(scan.Entropy()), extra(Sharp()), extra(Driving())) == (4.0, UNKNOWN[False], UNKNOWN[True])
    monkeypatch.setattr("headwise.scan.passes.plain_seconds", lambda opened: 1.0)
    plan = scan.plan(llama(), texts=[TEXT], questions=["entropy"])
    assert plan.seconds == pytest.approx(plan.tokens * (1 + 4.0 + extra(plan.passes[0].questions[1])))
    assert f"1 question of llama in 1 pass over {plan.tokens} tokens, about" in str(plan).replace(
        "LlamaForCausalLM", "llama"
    )


def test_what_the_command_was_is_kept() -> None:
    found = scan.heads(llama(), texts=[TEXT], questions=["entropy"], command="headwise scan x --all")
    assert found.payload()["command"] == "headwise scan x --all"
    assert scan.heads(llama(), texts=[TEXT], questions=["entropy"]).payload()["command"] == ""
