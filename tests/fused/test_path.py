"""The engine's fused path against its reference: every reading, edits, padding, windows, cached decoding."""

import pytest
import torch

from headwise.attention.call import AttentionCall, Labels
from headwise.attention.dense import dense
from headwise.attention.edits import Reweight, ScoreBias, ScoreMap
from headwise.attention.effects import resolve
from headwise.attention.mask import Mask
from headwise.attention.readings import (
    At,
    Distance,
    Entropy,
    LogSumExp,
    Mass,
    Received,
    Scores,
    SegmentEntropy,
    Top,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("start", "middle", "end")
READINGS = [
    Mass(), Mass(segments=("end", "self", "previous", "first", "window:3")), Entropy(), Top(), Top(k=3), Distance(),
    LogSumExp(), SegmentEntropy(("start", "end")), At(lags=(0, 4)), Scores(lags=(1,)), At(pairs=[(30, 7)]), Received(),
]  # fmt: skip
CALLS = {
    "causal": {},
    "window, padding": {"left": 9, "padding": True},
    "full": {"right": None},
    "one query, later keys": {"queries": 1, "j0": 6},
}
EDITS = {
    "none": [],
    "biases": [
        (ScoreBias(keys="end", value=0.7), [0, 2]),
        (ScoreBias(keys="start", value=-float("inf"), queries="middle"), [1]),
        (ScoreBias(value=-0.5, keys=torch.linspace(-1, 1, 30)), [3]),
        (ScoreBias(keys="middle", value=1.0), [0, 1, 2, 3]),
    ],
    "reweight": [(Reweight(rule=lambda m: 1.2 - m, groups=("start", "end"), queries="middle"), [0, 1, 3])],
}  # fmt: skip


def make(queries=10, keys=40, left=None, right=0, padding=False, j0=0):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE)

    mask = Mask(left=left, right=right, batch=2)
    if padding:
        mask.key_valid = (torch.arange(keys)[None] >= torch.tensor([[0], [11]])).to(DEVICE)
    i = torch.arange(queries, device=DEVICE) + j0 + keys - queries
    labels = torch.randint(0, 3, (2, keys), generator=g).sort().values.to(DEVICE)
    return AttentionCall(
        random(2, 4, queries, 16), random(2, 2, keys, 16), random(2, 2, keys, 16), 0.25, mask, i=i, j0=j0,
        query_valid=torch.rand(2, queries, generator=g).to(DEVICE) > 0.2,
        labels=Labels(NAMES, labels, torch.randint(0, 3, (2, queries), generator=g).to(DEVICE)),
    )  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", CALLS)
def test_fused_equals_dense(kind, edit):
    from headwise.attention.fused_path import fusable, fused

    effects = resolve(make(**CALLS[kind]), EDITS[edit])
    assert fusable(effects) == (True, "")
    out, values = fused(effects, READINGS, True)
    wanted_out, wanted = dense(effects, READINGS, torch.float64)
    torch.testing.assert_close(out.double(), wanted_out, atol=1e-5, rtol=1e-5)
    for reading in READINGS:
        for name, x in wanted[reading].items():
            found = values[reading][name].to(x.dtype)
            close = torch.isclose(found, x, atol=1e-4, rtol=1e-4, equal_nan=True)
            assert close.all(), (reading, name, found[~close][:3], x[~close][:3])


def test_what_is_refused_says_why():
    from headwise.attention.fused_path import fusable

    fits, why = fusable(resolve(make(), [(ScoreMap(torch.tanh), [0])]))
    assert not fits
    assert "ScoreMap" in why
