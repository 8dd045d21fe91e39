"""Studies of forced attention: slopes that are finite differences, rows that are the ones named, both verdicts."""

import numpy as np
import pandas as pd
import pytest
import torch
from tests.scan.models import llama

from headwise import steer
from headwise.attention import Blend, Inputs, Map, attend
from headwise.study import forced_attention as studied
from headwise.study import tasks

TEXT = "the family and the girls were there , and the girls were pleased with"
NAMED = tasks.Example(TEXT, (" family", " girls"), 0, {"receiver": (4, 10), "giver": (19, 24)})


def test_the_second_mention_of_the_giver_is_found() -> None:
    opened = llama()
    words = TEXT.split()
    assert studied.places(opened, NAMED) == {"receiver": words.index("family"), "again": 10}
    assert words[10] == "girls"


def test_the_slope_is_that_of_small_steps() -> None:
    opened = llama()
    found = studied.slope(opened, NAMED)
    assert found.abs().max() > 1e-3
    ids, at = opened.encode(TEXT)["input_ids"], studied.places(opened, NAMED)
    with attend(opened, [Inputs(("v",), name="v")]) as run, torch.no_grad():
        opened.model(ids)
    v = torch.tensor(run.tree["text"]["v"].isel(sample=0).transpose("layer", "head", ...).values)
    options = opened.tokenizer("family girls")["input_ids"]
    for layer, head in ((0, 1), (1, 3)):
        gaps = {}
        for name in at:
            for step in (-0.01, 0.01):
                alpha = torch.tensor([step])
                edit = Blend(alpha, target=v[layer, [head], at[name]], heads=[(layer, head)], tokens="last")
                with attend(opened, edits=[edit], segments=NAMED.segments(opened)), torch.no_grad():
                    logits = opened.model(ids).logits[0, -1]
                gaps[name, step] = float(logits[options[0]] - logits[options[1]])
        slopes = {name: (gaps[name, 0.01] - gaps[name, -0.01]) / 0.02 for name in at}
        assert found[layer, head].item() == pytest.approx(slopes["again"] - slopes["receiver"], rel=0.03, abs=2e-3)


def test_heads_are_forced_onto_the_wrong_colours_or_the_right_one() -> None:
    opened = llama()
    [example] = tasks.coloured_objects(0, 1)
    segments = example.segments(opened)
    masks = [segments.mask(name).flatten().numpy() for name in studied.COLOURS]
    for right in (True, False):
        [method] = studied.forced(opened, [(1, 2)], right)(example)
        with steer.apply(opened, method, segments=segments), attend(opened, [Map(layers=1)]) as run, torch.no_grad():
            opened.model(**opened.encode(example.prompt))
        row = run.tree["text"]["map"].isel(sample=0, query=-1).sel(layer=1, head=2).values
        wanted = [(0.0, 1.0)[right] if n == example.gold else (0.5, 0.0)[right] for n in range(3)]
        np.testing.assert_allclose([row[mask].sum() for mask in masks], wanted, atol=1e-5)
        seen = studied.looks(opened, example, [(1, 2)], [method])
        np.testing.assert_allclose(seen, [1, 0] if right else [0, 1], atol=1e-5)


def test_heads_in_the_order_of_what_they_give() -> None:
    opened = llama()
    examples = tasks.coloured_objects(0, 2)
    ranked = studied.by_mass(opened, examples, "question")
    mass = np.mean([studied.last_mass(opened, e, ["question"])[..., 0] for e in examples], 0)
    assert sorted(ranked) == [(layer, head) for layer in range(2) for head in range(4)]
    assert np.all(np.diff([mass[pair] for pair in ranked]) <= 0)


@pytest.mark.parametrize(("repaired", "verdict"), [(0.2, "holds"), (0.0, "fails")])
def test_the_verdict_follows_the_shares(monkeypatch, repaired: float, verdict: str) -> None:
    def evaluate(opened, examples, settings):
        rng = np.random.default_rng(0)
        rows = [
            {"setting": s, "example": n, "share": 0.5 + repaired * (s == "wrong") + 0.01 * rng.normal(), "right": 1.0}
            for n in range(len(examples))
            for s in ("plain", *settings)
        ]
        return pd.DataFrame(rows)

    monkeypatch.setattr(studied, "evaluate", evaluate)
    monkeypatch.setattr(studied, "inhibition_heads", lambda opened, count: ([(0, 1)], [1.0]))
    assert studied.forced_attention(llama(), seeds=(0,), count=8).verdict == verdict


def test_the_studies_run_on_a_model() -> None:
    opened = llama(num_attention_heads=8)
    found = studied.forced_attention(opened, seeds=(0,), count=2, chosen=2, draws=2).measured
    assert len(found["heads"]) == studied.KEPT
    assert {"wrong", "right", "random 0", "random 1"} == set(found["change_of_share"])
    assert found["perplexity"]["plain"] != found["perplexity"]["forced"]
    cut = studied.content_gatherers(opened, seeds=(0, 1), count=12, chosen=2, share=0.125).measured
    assert len(cut["heads"]) == 2
    prose = cut["perplexity"]
    assert set(prose) == {"plain", "gatherers", "all", "random 0", "random 1", "random 2"}
    assert len({round(x, 6) for x in prose.values()}) > 3
