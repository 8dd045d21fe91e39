"""The streaming path equals the dense reference, for every reading and edit."""

import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headwise.attention.stream as streaming
from headwise.attention.call import AttentionCall
from headwise.attention.dense import dense, scores
from headwise.attention.edits import Reweight, ScoreBias, ScoreMap, Shift
from headwise.attention.effects import resolve
from headwise.attention.readings import (
    At,
    Distance,
    Entropy,
    LogSumExp,
    Map,
    Mass,
    Propagate,
    Received,
    Scores,
    SegmentEntropy,
    Top,
)
from headwise.attention.stream import stream
from tests.attention.calls import calls

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def readings(call: AttentionCall):
    last = int(call.i[-1])
    targets = torch.randint(-1, last + 2, (last + 1, 3), generator=torch.Generator().manual_seed(1))
    x = torch.randn(max(last, call.j0 + call.keys) + 1, 2, generator=torch.Generator().manual_seed(2)).double()
    return [
        Mass(),
        Mass(segments=("self", "previous", "next", "first", "same", "window:3", "middle")),
        Entropy(),
        Top(),
        Top(k=4),
        Distance(),
        LogSumExp(),
        At(lags=(0, 1, 5)),
        At(targets=targets),
        At(pairs=[(last, call.j0), (int(call.i[0]), call.j0 + call.keys - 1), (10_000, 0)]),
        Scores(lags=(0, 2)),
        Received(),
        SegmentEntropy(),
        Propagate(x=x),
        Propagate(x=x, side="left"),
        Map(),
    ]


def edits(draw, call: AttentionCall):
    heads = sorted(draw(st.sets(st.integers(0, call.heads - 1), min_size=1)))
    vector = torch.randn(call.j0 + call.keys, generator=torch.Generator().manual_seed(3), dtype=call.q.dtype)
    step = torch.randn(call.q.shape[-1], generator=torch.Generator().manual_seed(4), dtype=call.q.dtype)
    every = list(range(call.heads))
    some = torch.arange(call.j0 + call.keys) % 3 == 0
    kinds = {
        "gain": (ScoreBias(math.log(1.7), keys="middle"), heads),
        "knockout": (ScoreBias(-math.inf, keys="start", queries="end"), every),
        "vector": (ScoreBias(0.5, keys=vector), every),
        "relative": (ScoreBias(1.0, keys="window:2"), heads),
        "map": (ScoreMap(lambda s: s + s.clamp(min=0), keys="middle", queries="start"), heads),
        "placed": (ScoreMap(lambda s, i, j: 0.5 * s + (i - j).abs().sqrt().to(s), placed=True, queries="end"), heads),
        "reweight": (Reweight(lambda m: 0.5 / m.clamp(min=1e-3).sqrt(), groups=("start", "end")), heads),
        "others": (Reweight(lambda m: (1 + m).flip(-1), groups=("middle", "*")), heads),
        "set": (Reweight(lambda m: 1 / (1 + m), groups=(some, "*")), every),
        "again": (Reweight(lambda m: 1 - m / 2, groups=("window:1",), queries="end"), every),
        "shift": (Shift(q=step, k=step, tokens="middle"), heads),
    }
    return [kinds[name] for name in draw(st.lists(st.sampled_from(sorted(kinds)), max_size=4, unique=True))]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float, what: str) -> None:
    a, b = a.double(), b.double()
    assert a.shape == b.shape, what
    assert torch.equal(a.isnan(), b.isnan()), what
    assert torch.equal(a.isinf(), b.isinf()), what
    finite = a.isfinite()
    a, b = a[finite], b[finite]
    error = ((a - b).abs() / (1 + b.abs())).max() if len(a) else torch.zeros(())
    assert error <= tolerance, f"{what}: {float(error):.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=25, deadline=None, derandomize="CI" in os.environ)
@given(data=st.data())
def test_stream_equals_dense(dtype: torch.dtype, data: st.DataObject) -> None:
    call = data.draw(calls(dtype))
    effects = resolve(call, edits(data.draw, call))
    wanted = readings(call)
    # Small tiles, so that short texts cross many of them; 10,000 rows, so that all fit one.
    tile, rows = data.draw(st.sampled_from([(64, 7), (128, 64), (2048, 256)]))
    # The reference in float64, from the same numbers: float32's own rounding is the stream's error alone.
    out, values = dense(effects, wanted, torch.float64 if dtype == torch.float64 else None)
    # float32 knows a score no better than its rounding, and a weight errs by as much as its score: large scores
    # (edits make some of 60) are allowed four roundings.
    s = scores(effects, dtype).s
    largest = float(s[s.isfinite()].abs().max()) if s.isfinite().any() else 0.0
    tolerance = max(TOLERANCE[dtype], 4 * torch.finfo(dtype).eps * largest)
    with mock.patch.multiple(streaming, TILE=tile, ROWS=rows):
        streamed, read = stream(effects, wanted)
    close(streamed, out, tolerance, "output")
    for reading in wanted:
        for name, value in values[reading].items():
            got = read[reading][name]
            if isinstance(reading, SegmentEntropy) and dtype == torch.float32:
                # Weights below 1e-38 are no numbers of float32: segments of such weights are left out.
                mass = dense(effects, [Mass(reading.segments)], torch.float64)[1][Mass(reading.segments)]["mass"]
                got, value = (torch.where(mass > 1e-30, x, 0.0) for x in (got, value))
            if name != "top_index":
                close(got, value, tolerance, f"{reading}: {name}")
                continue
            # Equal weights may stand in another order: the weight at the place found must be the one claimed.
            place = (got - call.j0).clamp(min=0)
            weights = values[Map()]["map"].gather(-1, place)
            claimed = read[reading]["top_value"]
            close(torch.where(got >= 0, weights, 0.0), claimed, tolerance, "top_index")
