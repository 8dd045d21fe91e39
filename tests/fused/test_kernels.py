"""The portable kernels against float64: in Triton's interpreter without a GPU, compiled with one."""

from dataclasses import replace

import pytest
import torch

from tests.fused.cases import compare, expected, make
from tests.fused.reference import error

pytest.importorskip("triton")

CASES = {
    "causal": {},
    "biased": {"layout": "short", "bias": True, "key_bias": True},
    "left window, padding": {"window": (20, None), "padding": True, "batch": 2},
    "two-sided window": {"causal": False, "window": (9, 5), "layout": "tokens"},
    "sinks, softcap": {"sinks": True, "softcap": 5.0, "dtype": torch.float16},
    "odd dims, sampled queries": {"positions": True, "dim": 20, "value_dim": 12},
    "split keys": {"queries": 3, "keys": 300, "sinks": True},
    "decoding": {"queries": 1, "keys": 300, "bias": True, "padding": True, "batch": 2, "dtype": torch.float16},
    "rows without keys": {"queries": 50, "keys": 40, "offset": -12, "bias": True},
    "no statistics": {"want": (), "segments": 0},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    from headwise.attention.fused import run

    call = make(1, device=DEVICE, **CASES[name])
    compare(call, run(call), expected(call), 1e-5)


@pytest.mark.parametrize("name", ["causal", "decoding", "sinks, softcap"])
def test_reweight_by_groups(name):
    from headwise.attention.fused import reweight

    call = make(2, device=DEVICE, **{"queries": 20} | CASES[name])
    groups = [0, 1, -1, 1, 0]
    found, factors = reweight(call, groups, lambda masses: 1.5 - masses)
    mass = expected(call)["mass"]
    members = [[s for s, g in enumerate(groups) if g == group] for group in range(2)]
    wanted = 1.5 - torch.stack([mass[..., m].sum(-1) for m in members], -1)
    assert error(factors, wanted) < 1e-5
    per_segment = torch.stack([wanted[..., g] if g >= 0 else torch.ones_like(wanted[..., 0]) for g in groups], -1)
    compare(call, found, expected(call, per_segment), 1e-5)


@pytest.mark.parametrize("name", ["biased", "left window, padding", "odd dims, sampled queries", "rows without keys"])
def test_second_pass(name):
    from headwise.attention.fused import run
    from headwise.attention.fused_second import band_mass, first_mass, received

    call = make(3, device=DEVICE, **{"queries": 20, "keys": 50} | CASES[name])
    wanted, lse = expected(call), run(call).lse
    a = wanted["weights"]
    valid = torch.rand(a.shape[0], a.shape[2], device=a.device) > 0.3
    position = (
        call.positions if call.positions is not None else torch.arange(a.shape[2], device=a.device) + call.query_offset
    )
    gap = position[:, None] - torch.arange(a.shape[3], device=a.device)
    assert error(received(call, lse), a.sum(2)) < 1e-5
    assert error(received(call, lse, valid), (a * valid[:, None, :, None]).sum(2)) < 1e-5
    assert error(band_mass(call, -2, 5, lse), (a * ((gap >= -2) & (gap <= 5))).sum(-1)) < 1e-5
    assert error(first_mass(call, lse), a[..., 0]) < 1e-5


def test_split_parts_do_not_depend_on_data():
    from headwise.attention.fused import run

    call = make(4, device=DEVICE, queries=2, keys=300)
    assert torch.equal(run(call).out, run(replace(call)).out)


def test_what_is_refused():
    from headwise.attention.fused import fused_attention
    from headwise.errors import HeadwiseError

    q = torch.zeros(1, 1, 2, 16, device=DEVICE)
    with pytest.raises(HeadwiseError, match=r"torch\.float64"):
        fused_attention(q.double(), q.double(), q.double(), scale=1.0)
    with pytest.raises(HeadwiseError, match="key_labels"):
        fused_attention(q, q, q, scale=1.0, want=frozenset({"mass"}))
    with pytest.raises(HeadwiseError, match="rows"):
        fused_attention(q, q, q, scale=1.0, want=frozenset({"rows"}))
