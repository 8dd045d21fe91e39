"""Calls with a form of their own: blocks of rows equal the whole, whatever is read, and edits keep their meaning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwise.attention import by_rows
from headwise.attention.by_rows import by_rows as blocks
from headwise.attention.call import AttentionCall, Labels
from headwise.attention.dense import dense
from headwise.attention.edits import Recompute, Recomputed, ScoreBias
from headwise.attention.effects import resolve
from headwise.attention.engine import Part, run_call
from headwise.attention.form import Form
from headwise.attention.mask import Mask
from headwise.attention.readings import At, Distance, Entropy, LogSumExp, Map, Mass, Propagate, Received, Scores, Top
from headwise.attention.recompute import run_rows
from headwise.errors import HeadwiseError


class Halves(Form):
    """Half of the sigmoid: no softmax, rows that stand alone."""

    softmax = False

    def weights(self, s, seen):
        return 0.5 * torch.sigmoid(s).masked_fill(~seen, 0.0)


class Together(Halves):
    """The same, with every head given the mean of all heads' weights."""

    local = False

    def weights(self, s, seen):
        return super().weights(s, seen).mean(1, keepdim=True).expand_as(s).contiguous()


class Distant(Form):
    """Softmax of scores that know positions and head numbers."""

    def scores(self, q, k, call):
        j = torch.arange(call.keys) + call.j0
        numbers = torch.tensor(call.head_ids, dtype=q.dtype)[None, :, None, None]
        return super().scores(q, k, call) - 0.1 * numbers * (call.i[:, None] - j).abs()


def drawn(form: Form, queries: int = 7, keys: int = 11) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator).double() for h, n in ((4, queries), (2, keys), (2, keys)))
    labels = Labels(("a", "b"), (torch.arange(keys) % 2)[None], (torch.arange(queries) % 2)[None])
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[1, 0] = False
    mask = Mask(right=0, key_valid=valid, batch=2)
    return AttentionCall(q, k, v, 0.3, mask, i=torch.arange(queries) + keys - queries, labels=labels, form=form)


READINGS = [
    Mass(("a", "self")), Entropy(), Top(2), Distance(), Map(), Received(), At(lags=(0, 3)), At(pairs=((5, 2), (9, 9))),
    Scores(lags=(1,)), Scores(pairs=((6, 1), (8, 8), (2, 1))), Propagate(torch.randn(11, 2).double(), side="left"),
    Propagate(torch.randn(11, 2).double(), side="right"),
]  # fmt: skip


@pytest.mark.parametrize("form", [Halves(), Distant()])
@pytest.mark.parametrize("edits", [[], [(ScoreBias(0.7, keys="a"), [1, 2])]])
def test_blocks_of_rows_equal_the_whole(form, edits, monkeypatch):
    call = drawn(form)
    effects = resolve(call, edits)
    keys = [reading.key() for reading in READINGS]
    wanted, values = dense(effects, keys)
    monkeypatch.setattr(by_rows, "PLACES", 30)  # two rows a block
    got, mine = blocks(effects, keys, True)
    torch.testing.assert_close(got, wanted)
    for key in keys:
        for name in values[key]:
            torch.testing.assert_close(mine[key][name], values[key][name], equal_nan=True)


@pytest.mark.parametrize("form", [Halves(), Together(), Distant()])
def test_some_rows_and_heads_are_those_of_the_whole(form):
    call, rows = drawn(form), torch.tensor([1, 4, 6])
    parts = [Part(Map()), Part(Map(), rows), Part(Map(), None, (1, 3)), Part(Entropy(), rows, (2,)), Part(Entropy())]
    whole, some, heads, few, entropy = (v for result in run_call(call, [], parts).values for v in result.values())
    torch.testing.assert_close(some, whole[:, :, rows])
    torch.testing.assert_close(heads, whole[:, [1, 3]])
    torch.testing.assert_close(few, entropy[:, [2]][:, :, rows])


def test_the_path_says_what_was_done():
    assert "is small" in run_call(drawn(Halves()), [], []).reason
    assert "mixes rows or heads" in run_call(drawn(Together()), [], []).reason
    wide = replace(drawn(Halves(), 200, 200), labels=None)
    assert run_call(wide, [], []).path == "rows"
    wide.q.requires_grad_()
    assert run_call(wide, [], []).reason == "gradients must flow through Halves"


def test_what_has_no_meaning_is_refused():
    with pytest.raises(HeadwiseError, match="Halves makes no softmax"):
        run_call(drawn(Halves()), [], [Part(LogSumExp())])
    rows = torch.zeros(1, 7, dtype=torch.bool)
    rows[:, 0] = True
    edit = Recompute(lambda call: Recomputed(rows, q=call.q))
    with pytest.raises(HeadwiseError, match="Together mixes rows or heads"):
        run_rows(drawn(Together()), [(edit, [0, 1, 2, 3])], [])
