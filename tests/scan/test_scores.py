"""Every question's arithmetic on values made by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from headwise.errors import HeadwiseError
from headwise.scan import roles
from headwise.scan.copying import copying
from headwise.scan.induction import InductionHeads, earlier_places
from headwise.scan.needles import NEEDLES, Needle, recall
from headwise.scan.positional import PositionalHeads
from headwise.scan.question import Prompt, Question
from headwise.scan.retrieval import RetrievalHeads, hits
from headwise.scan.sinks import Sinks

NOTHING = Prompt({})


def received(weights: np.ndarray) -> xr.Dataset:
    """What the readings of `Sinks` are for weights [head, query, key] of one causal layer."""
    visible = np.tril(np.ones(weights.shape[1:])).sum(0)
    mass = xr.DataArray(
        weights[None, :, :, :1].mean(2), dims=("layer", "head", "segment"), coords={"segment": ["first"]}
    )
    dims = ("sample", "layer", "head", "key")
    return xr.Dataset(
        {
            "received": (dims, weights.sum(1)[None, None]),
            "received_visible": (dims, np.broadcast_to(visible, (1, 1, len(weights), len(visible))).copy()),
            "mass": mass,
            "mass_sem": mass * 0,
        }
    )


def test_uniform_causal_attention_gives_the_counted_sink() -> None:
    n = 64
    uniform = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    found = Sinks().reduce(received(uniform[None]), NOTHING)
    assert found["first"].item() == pytest.approx(np.mean(1 / np.arange(1, n + 1)))
    assert found["largest"].item() == pytest.approx(np.mean(1 / np.arange(1, n + 1)))
    assert found["share"].item() == 0


def test_one_hot_attention_to_one_token_is_a_sink_there() -> None:
    n = 32
    first, third, own = np.zeros((3, n, n))
    first[:, 0] = 1
    third[:3, 0], third[3:, 3] = 1, 1
    own[np.arange(n), np.arange(n)] = 1
    found = Sinks().score(Sinks().reduce(received(np.stack([first, third, own])), NOTHING))
    np.testing.assert_allclose(found["sinks"][0], [1, 3 / n, 1 / n])
    np.testing.assert_allclose(found["sinks_any"][0], [1, 1, 1 / (n - 3 * n // 4 + 1)], atol=0.02)
    np.testing.assert_allclose(found["sink_share"][0], [1, 0, 0])


def test_earlier_places_are_those_of_the_same_token() -> None:
    ids = torch.tensor([9, 4, 5, 4, 5, 4])
    assert earlier_places(ids, start=1).tolist() == [[-1, -1], [-1, -1], [-1, -1], [1, -1], [2, -1], [1, 3]]


def test_the_beginning_token_is_no_earlier_copy() -> None:
    assert earlier_places(torch.tensor([7, 7, 7]), start=1).tolist() == [[-1], [-1], [1]]


@pytest.mark.parametrize("kind", ["induction", "off by one", "duplicate", "uniform"])
def test_prefix_matching_on_dense_attention(kind: str) -> None:
    length, repeats = 5, 3
    ids = torch.cat([torch.tensor([99]), torch.arange(length).repeat(repeats)])
    n = len(ids)
    matches = earlier_places(ids, start=1)
    weights = np.zeros((n, n))
    for place, row in enumerate(matches.tolist()):
        copies = [j for j in row if j >= 0]
        step = {"induction": 1, "off by one": 2, "duplicate": 0}.get(kind)
        if step is None or not copies:
            weights[place, : place + 1] = 1 / (place + 1)
        else:
            weights[place, [min(j + step, place) for j in copies]] = 1 / len(copies)
    queries = range(1 + length, n)
    after = torch.where(matches >= 0, matches + 1, -1)
    targets = torch.cat([after, matches], -1)[list(queries)]
    at = np.where(targets >= 0, np.take_along_axis(weights[list(queries)], targets.clamp(min=0).numpy(), 1), 0)
    values = xr.Dataset({"at": (("sample", "layer", "head", "query", "target"), at[None, None, None])})
    found = InductionHeads(length=length, repeats=repeats).reduce(values, NOTHING)
    expected = {"induction": (1, 0), "off by one": (0, 0), "duplicate": (0, 1)}.get(kind)
    if expected is None:
        counted = np.mean([(place - 1) // length / (place + 1) for place in queries])
        expected = (counted, counted)
    np.testing.assert_allclose([found["prefix"].item(), found["duplicate"].item()], expected, atol=1e-6)


def test_positional_columns_and_their_largest() -> None:
    names = ["self", "previous", "next", "first", "window:8"]
    mass = xr.DataArray([[[0.1, 0.7, 0.0, 0.1, 0.9], [0.2, 0.1, 0.6, 0.0, 1.0]]], dims=("layer", "head", "segment"))
    mass = mass.assign_coords(segment=names)
    found = PositionalHeads().score(xr.Dataset({"mass": mass, "mass_sem": mass / 10}))
    np.testing.assert_allclose(found["positional_heads"][0], [0.7, 0.6])
    np.testing.assert_allclose(found["positional_heads_sem"][0], [0.07, 0.06])
    np.testing.assert_allclose(found["local"][0], [0.9, 1.0])
    assert "separator" not in found


def test_one_hot_retrieval_scores_one_and_other_heads_nothing() -> None:
    ids = [10, 11, 12, 13, 14, 15]
    produced = [12, 13, 12]
    copier, late, elsewhere = [2, 3, 2], [3, 4, 3], [0, 0, 0]
    top = np.array([[copier, late, elsewhere]])
    np.testing.assert_allclose(hits(top, produced, ids, 2, 4, "set"), [[1, 0, 0]])
    np.testing.assert_allclose(hits(top, produced, ids, 2, 4, "step"), [[1.5, 0, 0]])


def test_too_few_answered_questions_are_an_error() -> None:
    place = ("layer", "head")
    values = xr.Dataset({"hits": (place, [[0.5]]), "hits_count": (place, [[3]]), "kept": 0.1, "kept_count": 30})
    with pytest.raises(HeadwiseError, match="answered 3 of 30 questions"):
        RetrievalHeads().score(values)


def test_recall_counts_words() -> None:
    assert recall("It is the Copper violin, copper!", "copper violin") == 1
    assert recall("a violin", "copper violin") == 0.5
    assert recall("", "copper violin") == 0


def test_needles_hold_their_answers() -> None:
    assert len({n.answer for n in NEEDLES}) == len(NEEDLES) == 6
    with pytest.raises(HeadwiseError, match="part of its text"):
        Needle("The cat sat.", "Who?", "dog")


def test_copying_is_one_for_a_copier_and_minus_one_for_its_opposite() -> None:
    tokens, width = 6, 8
    embed = torch.eye(tokens, width)
    values = torch.stack([embed, -embed])
    out = torch.eye(width).expand(2, -1, -1)
    np.testing.assert_allclose(copying(values, out, embed), [1, -1], atol=1e-6)


def test_the_first_rule_that_holds_names_the_role() -> None:
    table = pd.DataFrame(
        {
            "previous": [0.9, 0.0, 0.0, np.nan],
            "sinks": [0.6, 0.6, 0.1, 0.6],
            "sinks_any": [0.6, 0.6, 0.5, 0.6],
            "local": [0.9, 0.1, 0.1, np.nan],
        }
    )
    assert roles.assign(table) == ["previous token", "sink", "sink elsewhere", "sink"]
    assert roles.assign(pd.DataFrame({"entropy": [1.0]})) == ["mixed"]
    assert set(roles.rules()) >= {"sink", "induction", "retrieval", "previous token", "mixed"}


def test_names_are_snake_case() -> None:
    class LongNamed(Question):
        pass

    assert [q.name for q in (Sinks(), InductionHeads(), LongNamed())] == ["sinks", "induction_heads", "long_named"]


@pytest.mark.parametrize(
    "make", [lambda: Sinks(threshold=2), lambda: PositionalHeads(window=0), lambda: InductionHeads(seeds=0)]
)
def test_bad_options_are_refused(make: object) -> None:
    with pytest.raises(HeadwiseError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [
        ({"input_ids": torch.zeros(2, 7), "pixel_values": torch.zeros(1, 3, 64, 64)}, 14),
        ({"pixel_values": torch.zeros(2, 3, 64, 32)}, 16),
        ({"input_features": torch.zeros(1, 80, 3000)}, 3000),
        ({"input_values": torch.zeros(1, 500)}, 500),
        ({}, 1),
    ],
)
def test_tokens_are_counted_for_every_kind_of_input(inputs: dict, tokens: int) -> None:
    assert Prompt(inputs).tokens == tokens
