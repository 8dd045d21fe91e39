"""The studies of pattern injection, small, and their parts."""

import numpy as np
import pytest
import torch
from tests.scan.models import bert, tokenizer

import headwise as hw
from headwise.models import Opened, open_model
from headwise.study.pattern_injection import (
    RELATIVE,
    Text,
    drawn,
    followers,
    injected,
    passages,
    pattern_injection,
    pattern_relevance,
    reciprocal_ranks,
    relevance,
    vector,
    vectors,
)

TEXT = "the family was here. the house was large. he had a house."


@pytest.fixture(scope="module")
def opened() -> Opened:
    return open_model(bert().model, tokenizer=tokenizer())


def test_relevance_is_the_mass_on_the_pattern(opened: Opened) -> None:
    text = Text.of(opened, TEXT)
    ids = text.batch["input_ids"][0]
    with hw.attend(opened, [hw.Map()], segments=text.segments) as run, torch.no_grad():
        opened.model(**text.batch)
    a = run.tree["text"]["map"].values[0].astype(float)
    i = np.arange(len(ids))
    labels = text.segments.labels.numpy()
    same = (ids[:, None] == ids).numpy() & (i[:, None] != i)
    holds = {"previous token": i[:, None] - i == 1, "next token": i - i[:, None] == 1, "matching token": same}
    holds["same sentence"] = labels[:, None] == labels
    found = relevance(opened, text)
    assert set(found["pattern"].values) == {*RELATIVE, "matching token"}
    for name, pattern in holds.items():
        np.testing.assert_allclose(found.sel(pattern=name), (a * pattern).sum(-1).mean(-1), atol=1e-5)


def test_heads_are_chosen_once_and_as_many_are_drawn(opened: Opened) -> None:
    gr = relevance(opened, Text.of(opened, TEXT))
    for chosen in (followers(gr, 2), drawn(gr, 2, seed=0)):
        heads = [pair for some in chosen.values() for pair in some]
        assert len(heads) == len(set(heads)) == 8
    assert drawn(gr, 2, seed=0) != drawn(gr, 2, seed=1)
    alone = followers(gr.sel(pattern=["next token"]), 1)["next token"][0]
    assert float(gr.sel(pattern="next token", layer=alone[0], head=alone[1])) == float(
        gr.sel(pattern="next token").max()
    )


def test_injection_changes_the_vectors_and_ranks_count_what_is_as_near(opened: Opened) -> None:
    texts = [Text.of(opened, text) for text in (TEXT, "he was pleased with the girls.")]
    heads = drawn(relevance(opened, texts[0]), 2, seed=0)
    plain, changed = (vector(opened, texts[0], m) for m in ((), injected(heads, texts[0])))
    assert (plain - changed).abs().max() > 1e-4
    assert torch.equal(plain, vector(opened, texts[0], ()))
    one, other = vectors(opened, [texts, texts[::-1]], lambda text: ())
    assert torch.equal(one[0], plain)
    assert reciprocal_ranks(one, one).tolist() == [1.0, 1.0]
    assert reciprocal_ranks(one, other).tolist() == [0.5, 0.5]


def test_passages_leave_text_out_between_them() -> None:
    some = passages(3, 2)
    assert len(some) == len(set(some)) == 3


def test_the_studies_run(opened: Opened) -> None:
    assert pattern_relevance(opened, texts=4, sentences=3).verdict == "fails"  # a random model
    found = pattern_injection(opened, texts=5, calibration=2, heads=1, draws=(0,))
    assert found.verdict in ("holds", "fails")
    assert set(found.measured["change"]) == set(found.measured["moved"]) == {"followers", "drawn 0"}
    assert found.measured["moved"]["followers"]["mean"] > 1e-4
