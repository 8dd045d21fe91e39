"""Keys of a bias as bools, as a rule of query and key, or as the query's own segment: the same on every path."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headwise as hw
from headwise.attention.call import AttentionCall
from headwise.attention.dense import dense
from headwise.attention.edits import ScoreBias
from headwise.attention.effects import KeySet, resolve
from headwise.attention.engine import bias_matrix
from headwise.attention.mask import Mask
from headwise.attention.readings import Entropy, Map, Mass, Scores
from headwise.attention.stream import stream
from tests.attention.calls import calls


def chosen(call: AttentionCall, edit: ScoreBias) -> torch.Tensor:
    """[batch, query, key], one pair at a time."""
    found = torch.zeros(call.batch, call.queries, call.keys, dtype=torch.bool)
    for b in range(call.batch):
        for n, i in enumerate(call.i.tolist()):
            for m in range(call.keys):
                j = m + call.j0
                if edit.keys == "same":
                    labels = call.labels.keys[b]
                    found[b, n, m] = labels[i - call.j0] == labels[m]
                elif callable(edit.keys):
                    found[b, n, m] = bool(edit.keys(*map(torch.tensor, (b, 0, i, j))))
                else:
                    row = edit.keys if edit.keys.ndim == 1 else edit.keys[b]
                    found[b, n, m] = j < len(row) and row[j]
    return found


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_every_path_means_the_same_keys(data: st.DataObject) -> None:
    call = data.draw(calls(torch.float64, most=24))
    length = max(1, call.j0 + call.keys - 2)
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(call.batch, length, generator=generator) > 0.5
    ids = torch.randint(0, 4, (call.batch, call.j0 + call.keys), generator=generator)
    for keys in ("same", some, some[0], lambda b, h, i, j: (i - j) % 3 == 1, lambda b, h, i, j: ids[b, i] == ids[b, j]):
        for value in (1.3, -math.inf):
            edit = ScoreBias(value, keys=keys)
            effects = resolve(call, [(edit, list(range(call.heads)))])
            where = chosen(call, edit)[:, None]
            step = torch.zeros(where.shape, dtype=torch.float64).masked_fill(where, value)
            biased = replace(call, bias=step if call.bias is None else step + call.bias)
            wanted, values = dense(resolve(biased, []), [Map()])
            for path in (dense, stream):
                out, read = path(effects, [Map()])
                torch.testing.assert_close(read[Map()]["map"], values[Map()]["map"], atol=1e-10, rtol=0)
                torch.testing.assert_close(out, wanted, atol=1e-10, rtol=0)
            if value > 0:
                alone = replace(call, mask=Mask(batch=call.batch), bias=None)
                own, _ = bias_matrix(resolve(alone, [(edit, list(range(call.heads)))]))
                torch.testing.assert_close(own, step.expand_as(own), atol=1e-10, rtol=0)


def test_single_places_are_those_of_the_blocks() -> None:
    labels = torch.randint(0, 2, (2, 9), generator=torch.Generator().manual_seed(1))
    i, j = torch.arange(3, 9), torch.arange(9)
    sets = (
        KeySet(labels=labels, same=True),
        KeySet(rule=lambda b, h, i, j: (labels[b, i] == 1) & (j % 2 == 0), batch=2),
        KeySet(rule=lambda b, h, i, j: i - j == 2, batch=2),
    )
    for keys in sets:
        places = keys.at(i, 0, j.expand(2, len(i), -1))
        assert torch.equal(places, keys.block(i, 0, 0, 9)[:, 0].expand(2, -1, -1))


def test_the_mass_on_the_querys_own_segment() -> None:
    from tests.scan.models import llama

    opened = llama()
    parts = hw.Segments.from_spans({"one": (0, 4), "two": (4, 9), "three": (9, 12)}, 12)
    ids = torch.arange(3, 15)[None]
    readings = [Mass(("same", "one", "two", "three")), Map(), Entropy(), Scores(lags=(1,))]
    with hw.attend(opened, readings=readings, segments=parts) as run, torch.no_grad():
        opened.model(ids)
    a = torch.tensor(run.tree["text"]["map"].values)
    same = parts.labels[:, None] == parts.labels[None]
    found = torch.tensor(run.tree["text"]["mass"].sel(segment="same").values)
    torch.testing.assert_close(found, (a * same).sum(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "wrong,said",
    [
        (lambda: ScoreBias(1.0, keys=torch.ones(2, 3)), "one number a key"),
        (lambda: ScoreBias(-math.inf, keys=torch.ones(3)), "wants bools"),
        (lambda: ScoreBias(1.0, keys=3), "a rule; got 3"),
        (lambda: hw.Segments(("same",), torch.zeros(3, dtype=torch.long)), "relative kind"),
    ],
)
def test_bad_keys(wrong, said: str) -> None:
    with pytest.raises(hw.HeadwiseError, match=said):
        wrong()


def test_keys_that_do_not_fit_the_call() -> None:
    call = AttentionCall(*torch.ones(3, 2, 1, 4, 2), scale=1.0)
    for keys, said in (
        (torch.ones(5, dtype=torch.bool), "5 entries"),
        (torch.ones(3, 4, dtype=torch.bool), "3 samples"),
    ):
        with pytest.raises(hw.HeadwiseError, match=said):
            resolve(call, [(ScoreBias(1.0, keys=keys), [0])])
    with pytest.raises(hw.HeadwiseError, match="must answer with bools"):
        dense(resolve(call, [(ScoreBias(1.0, keys=lambda b, h, i, j: i - j), [0])]), [])
