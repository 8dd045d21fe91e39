"""The tasks of the swap bench ask what they say, and the bench trains, counts, keeps and refuses as it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from headwise import swap
from headwise.errors import HeadwiseError
from headwise.study.bench_plot import check_plot, plot
from headwise.study.bench_run import Setup, forecast, parameters, train_one
from headwise.study.bench_specs import Spec, specs_of, split, value_of
from headwise.study.bench_tasks import TASKS, UNASKED, quality
from headwise.study.swap_bench import COLUMNS, bench, read, summary

TINY = dict(steps=3, dim=16, layers=1)


def drawn(name: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batch = TASKS[name]().draw(torch.Generator().manual_seed(seed))
    return batch.get("input_ids", batch.get("x")), batch["labels"]


def test_copy_says_the_string_again():
    ids, labels = drawn("copy")
    task = TASKS["copy"]()
    assert torch.equal(ids[:, : task.half], ids[:, task.half + 1 :])
    assert (labels[:, : task.half + 1] == UNASKED).all()
    assert torch.equal(labels[:, task.half + 1 :], ids[:, : task.half])


def test_recall_asks_for_what_came_with_a_key_before():
    ids, labels = drawn("recall")
    task = TASKS["recall"]()
    asked = 0
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        known: dict[int, int] = {}
        for key, value, unasked, label in zip(row[::2], row[1::2], wanted[::2], wanted[1::2], strict=True):
            assert unasked == UNASKED
            assert key < task.keys <= value < task.vocabulary
            assert label == known.get(key, UNASKED)
            known[key] = value
            asked += label != UNASKED
        assert len(known) == task.pairs
    assert asked == len(ids) * task.pairs * (task.times - 1)


def test_retrieve_hides_one_fact():
    ids, labels = drawn("retrieve")
    marker = TASKS["retrieve"]().vocabulary - 1
    for row, wanted in zip(ids, labels, strict=True):
        first, last = (row == marker).nonzero()[:, 0].tolist()
        assert last == len(row) - 2
        assert (wanted[:-1] == UNASKED).all()
        assert wanted[-1] == row[first + 1] < 16
        assert ((row < 16).sum(), (row[:-1] < 16).sum()) == (2, 1)


def test_relations_are_twins_of_objects_that_training_never_shows():
    task = TASKS["relations"]()
    for batch in (task.draw(torch.Generator().manual_seed(0)), next(task.held_out())):
        same = (batch["x"][:, :, None] == batch["x"][:, None]).all(-1)
        assert torch.equal(same.sum(-1) - 1, batch["labels"])
        assert (batch["labels"].sum(1) == 4).all()
    assert not (task.training[:, None] == task.kept).all(-1).any()


def test_images_are_patches_and_held_out_apart():
    x, labels = drawn("images")
    task = TASKS["images"]()
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    whole = x[0].view(4, 4, 2, 2).transpose(1, 2).reshape(8, 8)
    assert (images == whole).all((1, 2)).any()
    assert sum(len(batch["labels"]) for batch in task.held_out()) == len(task.kept[0]) == 360
    assert len(task.training[0]) + 360 == 1797
    assert labels.max() < 10


def test_language_is_held_out_and_its_chance_is_the_entropy_of_characters():
    task = TASKS["lm"]()
    assert len(task.training) + len(task.kept) > 300_000
    counts = torch.bincount(task.training).double()
    share = counts[counts > 0] / counts.sum()
    assert task.chance == pytest.approx(float(-(share * share.log2()).sum()))
    ids, labels = drawn("lm")
    assert ids.shape == (32, 64)
    assert torch.equal(ids, labels)


@pytest.mark.parametrize("name", TASKS)
def test_seeds_decide_and_an_untrained_model_is_about_as_good_as_chance(name: str):
    task = TASKS[name]()
    first, again, other = (drawn(name, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    found = quality(Setup(**TINY).model(Spec.of("attention"), task, 0).eval(), task)
    assert abs(found - task.chance) < (0.15 if task.metric == "accuracy" else 3)
    for one, two in zip(task.held_out(), task.held_out(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_quality_counts_right_answers():
    task = TASKS["copy"]()

    class Oracle(torch.nn.Module):
        """Knows the string; says one wrong letter a sequence."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, labels):
            following = input_ids.roll(-1, 1)
            following[:, task.half] = (following[:, task.half] + 1) % task.letters
            return type("Output", (), {"logits": torch.nn.functional.one_hot(following, task.vocabulary).float()})

    assert quality(Oracle(), task) == pytest.approx(1 - 1 / task.half)


def test_settings_are_read():
    assert split("a:b=C(1, 2),d", ",") == ["a:b=C(1, 2)", "d"]
    assert value_of("true") is True
    assert value_of("-2.5") == -2.5
    assert value_of("relu") == "relu"
    assert value_of("Entmax(2.0)").alpha == 2.0
    assert value_of("Rope(base=500)").base == 500
    specs = specs_of("sigmoid_attention:b=-2:qk_norm=false,attention:normaliser=Entmax")
    assert specs[0].label == "attention"
    assert specs[1].make(32, 2, True).normaliser.b == -2
    assert isinstance(specs[2].make(32, 2, False).normaliser, swap.Entmax)
    assert len(specs_of("all")) == len(swap.MECHANISMS)


class NoCausalForm(swap.Attention):
    """Softmax attention that can't be causal."""

    causal_too = False


class Broken(swap.Attention):
    """Fails when it is run."""

    def attend(self, *given, **how):
        raise RuntimeError("out of order")


def test_a_bench_is_kept_and_gone_on_with(tmp_path):
    out = tmp_path / "bench.json"
    told = []
    asked = dict(tasks="copy,relations", seeds=2, out=out, progress=lambda *state: told.append(state), **TINY)
    runs = bench([NoCausalForm, Broken, "attention:qk_norm=true"], **asked)
    assert list(runs.columns) == COLUMNS
    assert told[0][:2] == (0, 16)
    assert "16 runs of 3 steps: about" in told[0][2]
    assert told[-1][:2] == (16, 16)
    found = summary(runs).set_index(["task", "mechanism"])
    assert found.loc[("copy", "no_causal_form"), "note"] == "no causal form"
    assert found.loc[("relations", "no_causal_form"), "quality"] == found.loc[("relations", "attention"), "quality"]
    assert found.loc[("copy", "broken"), "note"] == "failed: RuntimeError: out of order"
    assert found.loc[("copy", "broken"), "seeds"] == 0
    normed = runs[runs["mechanism"] == "attention:qk_norm=true"]
    plain = runs[runs["mechanism"] == "attention"]
    difference = normed["quality"].to_numpy() - plain["quality"].to_numpy()
    assert found.loc[("copy", "attention:qk_norm=true"), "gain"] == pytest.approx(difference[:2].mean())
    assert abs(normed["parameters"].to_numpy() - plain["parameters"].to_numpy()).max() <= 2 * 16 + 1
    assert (plain[["step_ms", "processor_ms", "memory_mb"]] > 0).all(axis=None)
    assert [step for step, _ in plain["curve"].iloc[0]] == [0, 1, 2, 3]

    stored = read(out)
    kept = [row for row in stored["runs"] if row["mechanism"] != "attention:qk_norm=true"]
    out.write_text(json.dumps({**stored, "runs": kept}))
    told.clear()
    again = bench([NoCausalForm, "attention:qk_norm=true"], resume=True, **asked)
    assert told[0][:2] == (0, 4)  # the runs that were missing
    same = again[again["mechanism"] == "attention:qk_norm=true"]
    assert same["quality"].tolist() == normed["quality"].tolist()
    assert not again["note"].str.startswith("failed").any()
    with pytest.raises(HeadwiseError, match=r"is there already"):
        bench("attention", **asked)
    with pytest.raises(HeadwiseError, match=r"another setup: steps=3 there and 4 here"):
        bench("attention", resume=True, **{**asked, "steps": 4})


def test_matched_and_free():
    task, spec = TASKS["copy"](), Spec.of("attention:qk_norm=true")
    setup = Setup(**TINY)
    plain = parameters(setup.model(Spec.of("attention"), task, 0))
    assert abs(parameters(setup.model(spec, task, 0)) - plain) <= 17
    assert parameters(replace(setup, params="free").model(spec, task, 0)) == plain + 2 * 16


def test_the_memory_of_a_step_is_what_the_backward_pass_needs():
    """A longer sequence's scores and vectors; equal for equal shapes."""
    setup = Setup(**TINY)
    rows = [train_one(Spec.of("attention"), name, 0, setup) for name in ("copy", "retrieve")]
    assert 0 < rows[0]["memory_mb"] < rows[1]["memory_mb"]
    assert forecast([], setup) == 0


def test_curves_are_drawn(tmp_path):
    row = dict(task="copy", seed=0, quality=0.5, parameters=9, step_ms=1.0, processor_ms=1.0, memory_mb=1.0, note="")
    import pandas as pd

    runs = pd.DataFrame(
        [{**row, "mechanism": name, "curve": [[0, 0.1], [5, 0.5]]} for name in ("attention", "other")], columns=COLUMNS
    )
    page = plot(runs, tmp_path / "curves.html", "the <command>").read_text()
    assert page.count("<svg") == 1
    assert "the &lt;command&gt;" in page
    assert "<td>other</td>" in page
    assert plot(runs, tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(HeadwiseError, match=r"ends in .html.*curves.gif"):
        check_plot(tmp_path / "curves.gif")


@pytest.mark.parametrize(
    "asked,said",
    [
        (dict(mechanisms="magic"), r"mechanisms: one of attention.*got 'magic'"),
        (dict(mechanisms="attention:colour=red"), r"'attention:colour=red' can't be made.*colour"),
        (dict(mechanisms="attention:qk_norm"), r"name:setting=value"),
        (dict(mechanisms="attention:position=Cosine"), r"Cosine is no position"),
        (dict(mechanisms="attention:position=Rope(0.5)"), r"base must be above 1"),
        (dict(mechanisms="attention:position=Rope(x)"), r"the part 'Rope\(x\)' can't be made"),
        (dict(tasks="copy,chess"), r"tasks: of lm.*got chess"),
        (dict(seeds=0), r"seeds=0"),
        (dict(resume=True), r"resume: from which file"),
        (dict(params="equal"), r"params: matched or free; got 'equal'"),
        (dict(dim=40), r"dim: a multiple of 16.*dim=40"),
        (dict(device="abacus"), r"device: 'abacus' can't be used"),
        (dict(steps=0), r"steps=0"),
        (dict(lr=float("nan")), r"lr: a positive number; got nan"),
        (dict(mechanisms=","), r"mechanisms: names, or all; got none"),
        (dict(mechanisms="attention:qk_norm=maybe"), r"qk_norm wants bool in 'attention:qk_norm=maybe'; got 'maybe'"),
        (dict(mechanisms="nexus_attention:order=1.5"), r"order wants int in .*; got 1.5"),
        (dict(mechanisms="multi_token_attention:depth=NaN"), r"depth wants .*; got nan"),
        (dict(mechanisms="attention:head_dim=-3"), r"Attention: head_dim must be at least 1; got -3"),
        (dict(mechanisms="attention:value_dim=0"), r"Attention: value_dim must be at least 1; got 0"),
        (dict(mechanisms="attention:score=near"), r"Attention: score wants a Score; got 'near'"),
        (dict(mechanisms="sigmoid_attention:b=null"), r"b is a number, 'auto' or 'match'; got None"),
        (
            dict(mechanisms="dual_attention:symbols=3", dim=32),
            r"symbols one of symbolic, position, relative or a module",
        ),
        (dict(mechanisms="positional_attention:length=-1"), r"'positional_attention:length=-1' can't be made"),
    ],
)
def test_mistakes_are_refused_by_name(asked, said):
    with pytest.raises(HeadwiseError, match=said):
        bench(**{"mechanisms": "attention", "tasks": "copy", **TINY, **asked})


@pytest.mark.parametrize("text", ["[]", "words", '{"setup": {}, "runs": [{}]}', '{"setup": [], "runs": []}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(HeadwiseError, match=r"holds no results of the swap bench"):
        bench("attention", "copy", out=tmp_path / "other.json", resume=True, **TINY)


@pytest.mark.parametrize("task", TASKS)
def test_every_mechanism_fits_every_task_at_the_sizes_of_all(task):
    same, kind = Setup(), TASKS[task]()
    batch = kind.draw(torch.Generator().manual_seed(0))
    sizes = {}
    for spec in specs_of("all"):
        if spec.kind.causal_too or not kind.causal:
            model = same.model(spec, kind, 0)
            sizes[spec.label] = sum(p.numel() for p in model.parameters())
            with torch.no_grad():
                assert model(**batch).loss.isfinite(), spec.label
    assert len(sizes) >= 28
    assert max(sizes.values()) / min(sizes.values()) < 1.01, sizes
