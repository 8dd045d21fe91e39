"""Some queries computed with other queries, keys and values: what two whole calls give, row by row."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headwise as hw
from headwise.attention.call import AttentionCall
from headwise.attention.dense import dense
from headwise.attention.edits import Blend, HeadGain, Recompute, Recomputed, ScoreBias
from headwise.attention.effects import resolve
from headwise.attention.engine import Part, run_call
from headwise.attention.readings import (
    At,
    Entropy,
    HeadOutput,
    Inputs,
    Map,
    Mass,
    Propagate,
    Received,
    Scores,
    Top,
)
from headwise.attention.recompute import run_rows
from tests.attention.calls import calls
from tests.scan.models import llama


def other(call: AttentionCall, share: float) -> Recomputed:
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(x.shape, generator=g, dtype=x.dtype) for x in (call.q, call.k, call.v))
    return Recomputed(torch.rand(call.batch, call.queries, generator=g) < share, q, k, v)


@settings(max_examples=8, deadline=None, derandomize="CI" in os.environ)
@given(data=st.data())
def test_every_row_is_that_of_its_own_call(data: st.DataObject) -> None:
    call = data.draw(calls(torch.float64, most=40))
    new = other(call, data.draw(st.sampled_from([0.0, 0.2, 0.8, 1.0])))
    every = list(range(call.heads))
    edits = [(ScoreBias(0.7, keys="middle"), every)]
    last = int(call.i[-1])
    pairs = At(pairs=[(last, call.j0), (int(call.i[0]), call.j0), (10_000, 0)])
    x = torch.randn(max(last, call.j0 + call.keys) + 1, 2, generator=torch.Generator().manual_seed(2)).double()
    by_row = [Mass(), Entropy(), Map(), Scores(lags=(0, 2)), Top(k=2), Propagate(x=x)]
    sums = [Received(), Propagate(x=x, side="left")]
    some = torch.arange(0, call.queries, 2)
    parts = [Part(r) for r in [*by_row, *sums, pairs]] + [Part(Entropy(name="some"), some, (0,))]
    found = run_rows(call, [*edits, (Recompute(lambda _: new), every)], parts)
    swapped = replace(call, q=new.q, k=new.k, v=new.v)
    (out, a), (out2, b) = (dense(resolve(c, edits), [*by_row, pairs]) for c in (call, swapped))
    rows = new.rows[:, None, :, None]
    torch.testing.assert_close(found.out, torch.where(rows, out2, out), atol=1e-10, rtol=0)
    for part, values in zip(parts, found.values, strict=True):
        if part.reading in by_row:
            for name, value in values.items():
                one, two = (x[part.reading][name] for x in (a, b))
                chosen = rows if value.ndim == 4 else rows[..., 0]
                wanted = torch.where(chosen, two, one)
                torch.testing.assert_close(value, wanted, atol=1e-10, rtol=0, equal_nan=True)
    merged = torch.where(rows, b[Map()]["map"], a[Map()]["map"]) * call.valid()[:, None, :, None]
    torch.testing.assert_close(found.values[6]["received"], merged.sum(2), atol=1e-10, rtol=0)
    left = torch.einsum("bhij,ic->bhjc", merged, x[call.i])
    torch.testing.assert_close(found.values[7]["propagate"], left, atol=1e-9, rtol=0)
    first = torch.where(new.rows[:, None, [-1, 0]], b[pairs]["at"][..., :2], a[pairs]["at"][..., :2])
    torch.testing.assert_close(found.values[8]["at"][..., :2], first, atol=1e-10, rtol=0)
    entropy = torch.where(rows[..., 0], b[Entropy()]["entropy"], a[Entropy()]["entropy"])
    torch.testing.assert_close(found.values[9]["entropy"], entropy[:, :1, some], atol=1e-10, rtol=0)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_edits_of_outputs_see_all_rows_and_heads_are_chosen(share: float) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 4, generator=g).double() for h in (4, 2, 2))
    call = AttentionCall(q, k, v, scale=0.5)
    new = other(call, share)
    part = Part(HeadOutput(what="vector")), Part(Inputs(("q",)))
    late = [(Blend(0.3, target="mean"), [0, 2]), (HeadGain(gain="mean"), [1, 2])]
    found = run_rows(call, [(Recompute(lambda _: new), [1, 2]), *late], part)
    a, b = (run_call(c, [], []).out for c in (call, replace(call, q=new.q, k=new.k, v=new.v)))
    wanted = a.clone()
    wanted[:, 1:3] = torch.where(new.rows[:, None, :, None], b[:, 1:3], a[:, 1:3])
    mean = v.repeat_interleave(2, 1).mean(2, keepdim=True)  # of the model's own values
    wanted[:, [0, 2]] = 0.7 * wanted[:, [0, 2]] + 0.3 * mean[:, [0, 2]]
    wanted[:, 1:3] = wanted[:, 1:3].mean(2, keepdim=True)
    torch.testing.assert_close(found.out, wanted, atol=1e-7, rtol=0)
    torch.testing.assert_close(found.values[0]["head_output"], found.out)
    asked = q.clone()
    asked[:, 1:3] = torch.where(new.rows[:, None, :, None], new.q[:, 1:3], q[:, 1:3])
    torch.testing.assert_close(found.values[1]["input_q"], asked)


def test_on_a_model_and_only_one_a_layer() -> None:
    opened = llama()
    ids = torch.arange(3, 13)[None]

    def zero(call: AttentionCall) -> Recomputed:
        return Recomputed(call.i[None] == 9, q=torch.zeros_like(call.q))

    with hw.attend(opened, [hw.Map(layers=0)], [Recompute(zero, layer=0)]) as run, torch.no_grad():
        opened.model(ids)
    with hw.attend(opened, [hw.Map(layers=0)]) as plain, torch.no_grad():
        opened.model(ids)
    found, own = (torch.tensor(r.tree["text"]["map"].values[0, 0]) for r in (run, plain))
    torch.testing.assert_close(found[:, :9], own[:, :9], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 9], torch.full((4, 10), 0.1), atol=1e-6, rtol=0)
    assert "1 of 10 queries recomputed" in run.explain()
    with pytest.raises(hw.HeadwiseError, match="one at a time"), hw.attend(opened, edits=[Recompute(zero)] * 2):
        opened.model(ids)
    with pytest.raises(hw.HeadwiseError, match="a function of an AttentionCall"):
        Recompute(make=3)
    wrong = Recompute(lambda call: Recomputed(call.i[None] >= 0, q=call.q[..., :1]))
    with pytest.raises(hw.HeadwiseError, match="q must have shape"), hw.attend(opened, edits=[wrong]):
        opened.model(ids)
