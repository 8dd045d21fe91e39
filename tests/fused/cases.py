"""Random attention calls for the fused kernels, and their comparison with the float64 reference."""

import torch

from headwise.attention.fused import FusedCall
from tests.fused.reference import error, reference

ALL = frozenset({"mass", "entropy", "segment_entropy", "distance", "top"})


def labels(batch, keys, segments, kind, generator):
    """kind: long runs, short runs with gaps, or one label a token."""
    if kind == "runs":
        cuts = torch.randint(1, keys, (segments - 1,), generator=generator).sort().values
        return torch.bucketize(torch.arange(keys), cuts, right=True)[None].expand(batch, -1).to(torch.int8).contiguous()
    width = 7 if kind == "short" else 1
    found = torch.randint(-1, segments, (batch, -(-keys // width)), generator=generator)
    return found.repeat_interleave(width, 1)[:, :keys].to(torch.int8).contiguous()


def make(seed, *, batch=1, heads=4, kv_heads=2, queries=40, keys=70, dim=16, value_dim=None, dtype=torch.float32,
         device="cpu", causal=True, offset=None, window=None, padding=False, softcap=None, sinks=False, segments=5,
         layout="runs", bias=False, key_bias=False, positions=False, want=ALL):  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    q = random(batch, queries, heads, dim).transpose(1, 2)
    k, v = random(batch, kv_heads, keys, dim), random(batch, kv_heads, keys, value_dim or dim)
    valid = None
    if padding:
        valid = torch.arange(keys)[None] >= torch.randint(0, keys // 2, (batch, 1), generator=g)
    table = None
    if bias:
        table = random(heads, 3, segments)
        table[0, 1, segments - 1] = -float("inf")
    call = FusedCall(
        q, k, v, scale=dim**-0.5, causal=causal, query_offset=keys - queries if offset is None else offset,
        positions=torch.randperm(keys, generator=g)[:queries].sort().values if positions else None,
        window=window, key_valid=valid, softcap=softcap, sinks=random(heads) if sinks else None,
        key_labels=labels(batch, keys, segments, layout, g) if segments else None,
        query_labels=torch.randint(0, 3, (batch, queries), generator=g) if bias else None, segments=segments,
        bias_table=table, key_bias=random(heads, keys) if key_bias else None,
        want=frozenset(want) if segments else frozenset(want) - {"mass", "segment_entropy"},
    )  # fmt: skip
    for name, x in list(vars(call).items()):
        if isinstance(x, torch.Tensor):
            setattr(call, name, x.to(device).to(dtype) if name in "qkv" else x.to(device))
    return call


def expected(call, factors=None):
    return reference(
        call.q, call.k, call.v, scale=call.scale, causal=call.causal, query_offset=call.query_offset,
        positions=call.positions, window=call.window, key_valid=call.key_valid, softcap=call.softcap, sinks=call.sinks,
        key_labels=call.key_labels, query_labels=call.query_labels, segments=call.segments, bias_table=call.bias_table,
        key_bias=call.key_bias, factors=factors,
    )  # fmt: skip


def compare(call, found, wanted, tolerance):
    """Errors of every statistic asked for; fails above the tolerance (out: the dtype's own, tolerance * 100)."""
    names = ["lse"] + (["out"] if call.v is not None else [])
    names += [n for n in ("mass", "entropy", "segment_entropy", "distance") if n in call.want]
    names += ["distance_sq"] if "distance" in call.want else []
    # An entropy is a difference of logarithms: where all are 0 (one key a segment) its error is relative to 1.
    least = {"entropy": 1.0, "segment_entropy": 1.0}
    errors = {name: error(getattr(found, name), wanted[name], least.get(name, 1e-9)) for name in names}
    if "top" in call.want:
        errors["top_value"] = error(found.top_value, wanted["top_value"])
        seen = found.top_index >= 0
        assert torch.equal(seen, (wanted["top_value"] > 1e-40).to(seen.device))
        at = wanted["weights"].gather(-1, found.top_index.clamp(min=0).long()[..., None])[..., 0]
        assert error(torch.where(seen, at, 0), wanted["top_value"]) < max(tolerance, 1e-6)
    rough = {torch.float32: tolerance, torch.float16: 2e-3, torch.bfloat16: 1e-2}[call.q.dtype]
    bad = {n: e for n, e in errors.items() if not e < (rough if n == "out" else tolerance)}
    assert not bad, (bad, found.path)
    return errors
