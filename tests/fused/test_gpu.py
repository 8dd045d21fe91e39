"""The compiled kernels, the Hopper one among them, on a grid of calls against float64."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fused.cases import ALL, compare, expected, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HOPPER = ALL - {"distance", "top"}
SETTINGS = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bias, sinks", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("want", [frozenset({"mass", "entropy"}), HOPPER], ids=["mass", "all"])
@SETTINGS
@given(data=st.data())
def test_hopper(dim, bias, sinks, want, data):
    from headwise.attention.fused import run

    keys = data.draw(st.integers(130, 1200))
    queries = data.draw(st.integers(100, 700))
    call = make(
        data.draw(st.integers(0, 99)), batch=data.draw(st.integers(1, 2)), heads=4,
        kv_heads=data.draw(st.sampled_from([1, 2, 4])),
        queries=queries, keys=keys, dim=dim, dtype=torch.bfloat16, device="cuda", causal=data.draw(st.booleans()),
        offset=data.draw(st.sampled_from([0, keys - queries])), sinks=sinks, bias=bias, segments=7,
        layout=data.draw(st.sampled_from(["runs", "short"])), want=want,
    )  # fmt: skip
    compare(call, run(call), expected(call), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256)])
@SETTINGS
@given(data=st.data())
def test_portable(dtype, dim, value_dim, data):
    from headwise.attention.fused import run

    queries, keys = data.draw(st.sampled_from([1, 17, 300])), data.draw(st.integers(12, 900))
    call = make(
        data.draw(st.integers(0, 99)), batch=data.draw(st.integers(1, 2)), heads=6,
        kv_heads=data.draw(st.sampled_from([2, 6])),
        queries=queries, keys=keys, dim=dim, value_dim=value_dim, dtype=dtype, device="cuda", causal=True,
        offset=data.draw(st.sampled_from([0, keys - queries])), padding=dtype != torch.float32,
        softcap=20.0 if dtype == torch.float16 else None, window=(50, None) if dim == 80 else None,
        sinks=dim == 96, bias=dim == 128, key_bias=dim == 64, layout="tokens", segments=9,
    )  # fmt: skip
    compare(call, run(call), expected(call), 2e-5)


@pytest.mark.parametrize("layout", ["runs", "short"])
@pytest.mark.parametrize("queries", [1, 20, 600])
def test_reweight(layout, queries):
    from headwise.attention.fused import reweight

    call = make(
        5, heads=8, kv_heads=2, queries=queries, keys=3000, dim=128, dtype=torch.bfloat16, device="cuda", segments=6,
        layout=layout, want={"mass", "entropy"}, bias=True,
    )  # fmt: skip
    found, _ = reweight(call, [0, 1, -1, 1, 0, -1], lambda masses: torch.full_like(masses, 0.25))
    factors = torch.tensor([0.25, 0.25, 1.0, 0.25, 0.25, 1.0], device="cuda").expand(1, 8, queries, -1)
    compare(call, found, expected(call, factors), 2e-5)
