"""Studies of contextual heads: examples that say what they name, masses that are the matrix's, and verdicts."""

import numpy as np
import pandas as pd
import pytest
import torch
from tests.scan.models import llama

from headwise import steer
from headwise.attention import Map, attend
from headwise.study import contextual_heads as studied
from headwise.study import tasks

HEADS = [(0, 1), (1, 0), (1, 3)]


def test_an_example_to_learn_from_names_the_document_and_the_answer() -> None:
    opened = llama()
    [example] = tasks.documents(0, 1, 4, place=2)
    found = studied.focus(opened, example)
    text = example.prompt + example.options[example.gold]
    assert opened.decode(found.ids) == opened.decode(opened.encode(text)["input_ids"][0])
    answer = text[text.rindex("? ") + 2 :]
    for name, part in (("answer", answer), ("relevant", example.prompt[slice(*example.spans["document 3"])])):
        words = opened.tokenizer(part, add_special_tokens=False)["input_ids"]
        assert int(found.segments.mask(name).sum()) == len(words)


def test_masses_are_those_of_the_last_row() -> None:
    opened = llama()
    [example] = tasks.documents(0, 1, 4, place=2)
    method = steer.TokenScale(gain=0.5)
    segments = example.segments(opened)
    for methods in ([], [method]):
        edits = [edit for m in methods for edit in m.edits(opened)]
        with attend(opened, [Map()], edits=edits, segments=segments) as run, torch.no_grad():
            opened.model(**opened.encode(example.prompt))
        rows = run.tree["text"]["map"].isel(sample=0, query=-1).transpose("layer", "head", "key").values
        rows = rows[tuple(zip(*HEADS, strict=True))]
        wanted = [rows[:, segments.mask("document 3").flatten().numpy()].sum(-1).mean(), rows[:, 0].mean()]
        np.testing.assert_allclose(studied.masses(opened, example, methods, HEADS), wanted, atol=1e-5)


def test_what_a_setting_is_above_the_mean_of_others() -> None:
    values = {"a": [3.0, 5.0], "b": [1.0, 2.0], "c": [2.0, 4.0]}
    rows = [{"setting": s, "example": n, "logp": x} for s, given in values.items() for n, x in enumerate(given)]
    assert studied.over_mean(pd.DataFrame(rows), "a", ["b", "c"]).mean == pytest.approx(np.mean([1.5, 2.0]))


@pytest.mark.parametrize(("contextual", "verdict"), [(True, "holds"), (False, "fails")])
def test_few_and_stable_heads_are_told_from_all_alike(monkeypatch, contextual: bool, verdict: str) -> None:
    def scored(opened, prompts, first=0):
        rng = np.random.default_rng(first)
        base = np.exp(3 * np.arange(100) / 100) / 100 if contextual else np.full(100, 0.02)
        base[:6] += 0.5 * contextual
        noise = 1e-4 * rng.normal(size=100)
        places = {"layer": np.arange(100) // 10, "head": np.arange(100) % 10}
        return pd.DataFrame(places | {"contextual_heads": base + noise, "context_others": 0.1, "context_sink": 0.5})

    monkeypatch.setattr(studied, "scored", scored)
    found = studied.contextual_heads(llama())
    assert found.verdict == verdict
    assert (found.measured["spearman"] > 0.8) is contextual


def test_the_studies_run_on_a_model() -> None:
    opened = llama()
    assert len(studied.contextual_heads(opened, prompts=4).measured["heads"]) == 1
    split = studied.split_softmax(opened, seeds=(0,), count=2, calibration=2, heads=2).measured
    assert {"raised", "lowered", "other document", "random 0"} <= set(split["change"])
    assert split["perplexity"]["plain"] != split["perplexity"]["raised"]
    focused = studied.focus_directions(
        opened, seeds=(0,), count=2, calibration=2, training=2, heads=2, epochs=2
    ).measured
    assert set(focused["change"]) == {*map(str, studied.ALPHAS), "random direction", "random heads"}
    assert focused["alpha"] > 0
