"""Kernel benchmarks: fused attention with statistics against PyTorch's kernels without."""

import torch
import torch.nn.functional as F
from gpu_timing import alternate, graphed, teraflops
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwise import HeadGain, Reweight, ScoreBias, Segments
from headwise.attention.call import AttentionCall
from headwise.attention.fused import FusedCall, reweight, run
from headwise.attention.fused_second import received
from headwise.attention.fused_step import fused_step
from headwise.attention.incoming import Seen
from headwise.attention.label_table import LabelTable
from headwise.attention.scratch import Scratch

SHAPES = {"llama-8b": (32, 8, 128), "smol-135m": (9, 3, 64)}
SEGMENTS = 16
WANT = frozenset({"mass", "entropy"})


def inputs(heads, kv_heads, dim, queries, keys, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)

    def random(count, length):
        return torch.randn(1, count, length, dim, device="cuda", dtype=torch.bfloat16, generator=g)

    return random(heads, queries), random(kv_heads, keys), random(kv_heads, keys)


def segments_of(keys, count=SEGMENTS, seed=0):
    """`count` contiguous segments with random, unaligned borders."""
    g = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(keys - 1, generator=g)[: count - 1].sort().values + 1
    return torch.bucketize(torch.arange(keys), cuts, right=True).to(torch.int8)[None].cuda()


def sdpa(backend, q, k, v, causal=True):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def eager_with_statistics(q, k, v, labels):
    """What a hook on an eager model costs: the whole matrix."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), float("-inf"))
    a = s.softmax(-1, dtype=torch.float32)
    onehot = F.one_hot(labels[0].long(), SEGMENTS).float()
    return a.to(q.dtype) @ v, a @ onehot, torch.special.entr(a).sum(-1)


def flex(q, k, v, length):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def prefill(shape, length, rounds, with_flex=True):
    heads, kv_heads, dim = SHAPES[shape]
    q, k, v = inputs(heads, kv_heads, dim, length, length)
    labels, scale = segments_of(length), dim**-0.5
    bias = torch.randn(heads, 2, SEGMENTS, device="cuda")
    query_labels = (torch.arange(length, device="cuda") > length // 2).int()[None]
    base = {"scale": scale, "causal": True, "key_labels": labels, "segments": SEGMENTS}
    plain = FusedCall(q, k, v, scale=scale, causal=True)
    scanned = FusedCall(q, k, v, want=WANT, **base)
    biased = FusedCall(q, k, v, want=WANT, bias_table=bias, query_labels=query_labels, **base)
    inner = FusedCall(q, k, v, want=WANT | {"segment_entropy"}, bias_table=bias, query_labels=query_labels, **base)
    windowed = FusedCall(q, k, v, want=WANT | {"distance", "top"}, **base)
    cases = {
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v),
        "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v),
        "fused, no statistics": lambda: run(plain),
        "fused, 16 masses + entropy": lambda: run(scanned),
        "fused, with biases": lambda: run(biased),
        "fused, with biases + segment entropy": lambda: run(inner),
        "portable, 16 masses + entropy + distance + top": lambda: run(windowed),
    }
    if with_flex:
        try:
            cases["flex, no statistics"] = flex(q, k, v, length)
        except RuntimeError as error:
            print("flex:", str(error).splitlines()[0])
    if length <= 65536:
        cases["eager with statistics"] = lambda: eager_with_statistics(q, k, v, labels)
    if length <= 16384:
        lse = run(plain).lse
        cases["received (second pass)"] = lambda: received(plain, lse)
        groups = [n % 3 - 1 for n in range(SEGMENTS)]
        cases["reweight 2 groups"] = lambda: reweight(scanned, groups, lambda m: 1.5 - m)
    times, failed = alternate(cases, rounds)
    rows = []
    for name, ms in times.items():
        rows.append({
            "shape": shape, "tokens": length, "case": name, "ms": ms,
            "tflops": teraflops(heads, dim, length, length, True, ms), "against_cudnn": ms / times["cudnn"],
        })  # fmt: skip
    rows += [{"shape": shape, "tokens": length, "case": name, "failed": why} for name, why in failed.items()]
    return rows


def decode(shape, keys, rounds):
    """One query against a long cache: plain, with biases and statistics, and one step of steered generation.

    `ms` is what a caller waits who launches them one by one, `chip_ms` the time of the chip alone (replayed from a CUDA
    graph)."""
    heads, kv_heads, dim = SHAPES[shape]
    q, k, v = inputs(heads, kv_heads, dim, 1, keys)
    labels = segments_of(keys)
    base = {"scale": dim**-0.5, "causal": True, "query_offset": keys - 1, "key_labels": labels, "segments": SEGMENTS}
    scanned = FusedCall(q, k, v, want=WANT, **base)
    step, seen = step_of(q, k, v, labels), Seen(keys - 1, 0, None, None, None)
    cases = {
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, causal=False),
        "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, causal=False),
        "fused, 16 masses + entropy": lambda: run(scanned),
        "step: biases, reweight 2 groups, gains": lambda: step.run(q, k, v, seen),
    }
    times, failed = alternate(cases, rounds)
    chip, _ = alternate({name: graphed(cases[name]) for name in times}, rounds)
    moved = 2 * keys * kv_heads * dim * 2 / 1e9
    found = [{"case": name, "ms": ms} for name, ms in times.items()]
    found += [{"case": name, "failed": why} for name, why in failed.items()]
    for row in found:
        if row["case"] in chip:
            row |= {"chip_ms": chip[row["case"]], "gb_per_s": moved / chip[row["case"]] * 1e3}
    return [{"shape": shape, "tokens": keys} | row | {"case": "decode: " + row["case"]} for row in found]


def step_of(q, k, v, labels):
    """A decoding step with all three edits, for half of the heads each."""
    known = LabelTable(Segments(tuple(f"part {n}" for n in range(SEGMENTS)), labels[0].long().cpu()), q.device)
    call = AttentionCall(q, k, v, q.shape[-1] ** -0.5, i=torch.tensor([k.shape[2] - 1], device=q.device))
    half = list(range(q.shape[1] // 2))
    edits = [
        ScoreBias(keys="part 3", value=0.7),
        Reweight(rule=lambda masses: 1.5 - masses, groups=("part 1", "part 5")),
        HeadGain(gain=0.5),
    ]
    return fused_step(call, [(edit, half) for edit in edits], known, Scratch())


def accuracy(shape, length, sampled=64):
    """Relative error of the output and the statistics against float64, for sampled queries of all heads."""
    heads, kv_heads, dim = SHAPES[shape]
    q, k, v = inputs(heads, kv_heads, dim, length, length, seed=1)
    labels = segments_of(length)
    found = run(FusedCall(q, k, v, scale=dim**-0.5, causal=True, want=WANT, key_labels=labels, segments=SEGMENTS))
    cudnn = sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)
    rows = torch.randperm(length, device="cuda")[:sampled].sort().values
    onehot = F.one_hot(labels[0].long(), SEGMENTS).double()
    errors = {"fused": [0.0, 0.0], "cudnn": [0.0, 0.0], "mass": [0.0, 0.0], "entropy": [0.0, 0.0]}
    for head in range(heads):
        kv = head // (heads // kv_heads)
        s = (q[0, head, rows].double() @ k[0, kv].double().T) * dim**-0.5
        s = s.masked_fill(torch.arange(length, device="cuda")[None] > rows[:, None], float("-inf"))
        a = s.softmax(-1)
        wanted = {"out": a @ v[0, kv].double(), "mass": a @ onehot, "entropy": torch.special.entr(a).sum(-1)}
        for name, x, y in (
            ("fused", found.out, "out"), ("cudnn", cudnn, "out"), ("mass", found.mass, "mass"),
            ("entropy", found.entropy, "entropy"),
        ):  # fmt: skip
            errors[name][0] += float((x[0, head, rows].double() - wanted[y]).square().sum())
            errors[name][1] += float(wanted[y].square().sum())
    return {"shape": shape, "tokens": length, "case": "relative error"} | {
        n: (a / b) ** 0.5 for n, (a, b) in errors.items()
    }
