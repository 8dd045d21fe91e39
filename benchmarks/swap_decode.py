"""What a token of decoding costs on a GPU by the number of key-value heads: one layer of multi-query attention.

    python benchmarks/swap_decode.py [--out benchmarks/results/swap_decode_h100.json]

16 query heads of 128 channels (a layer of width 2,048), a batch of 16, bfloat16; the layer itself fills the cache.
A token is the whole layer (projections, cache, attention); `ms` is the median over turns in which the cases take turns,
`replayed_ms` the same kernels replayed as one CUDA graph, without the host's part.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
from gpu_timing import alternate

from headwise import swap

HEADS, DIM, BATCH = 16, 128, 16
KV_HEADS = (16, 4, 1)
CONTEXTS = (1024, 4096, 8192, 16384, 32768)


def filled(kv_heads, context):
    """A layer, its cache of so many tokens, and the next token."""
    torch.manual_seed(0)
    layer = swap.MultiQueryAttention(HEADS * DIM, HEADS, kv_heads, causal=True).to("cuda", torch.bfloat16)
    cache = swap.Cache()
    for _ in range(0, context, 1024):
        layer(torch.randn(BATCH, 1024, HEADS * DIM, device="cuda", dtype=torch.bfloat16), cache=cache)
    return layer, cache, torch.randn(BATCH, 1, HEADS * DIM, device="cuda", dtype=torch.bfloat16)


def token(layer, cache, x, context):
    def run():
        layer(x, cache=cache)
        cache.crop(context)

    return run


def attention(layer, cache):
    """PyTorch's attention by itself on the same cache, with its choice of kernel."""
    kept = cache.of(layer).grown
    q = torch.randn(BATCH, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, kept["k"], kept["v"], enable_gqa=True)


def replayed(run):
    """The same kernels as one CUDA graph, captured after a warm-up on the stream of the capture."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


@torch.no_grad()
def measure(context):
    made = {kv: filled(kv, context) for kv in KV_HEADS}
    runs = {kv: token(*made[kv], context) for kv in KV_HEADS}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        runs[1]()
        torch.cuda.synchronize()
    kernels = sorted({event.name[:80] for event in seen.events() if "flash" in event.name or "fmha" in event.name})
    times, failed = alternate({f"{kv}": run for kv, run in runs.items()})
    alone, failed_alone = alternate({f"{kv}": attention(*made[kv][:2]) for kv in KV_HEADS})
    try:
        graphs, failed_graphs = alternate({f"{kv}": replayed(run) for kv, run in runs.items()})
    except Exception as error:  # a capture that is refused costs its column, not the run
        graphs, failed_graphs = {}, {"all": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    rows = []
    for kv in KV_HEADS:
        layer, cache, _ = made[kv]
        name = f"{kv}"
        rows.append({
            "context": context, "kv_heads": kv, "cache_mb": cached(cache, layer) / 2**20,
            "bytes_a_token": 2 * layer.cached_per_token,
            "ms": times.get(name), "replayed_ms": graphs.get(name), "attention_ms": alone.get(name),
            "times_faster": ratio(times, name), "times_faster_replayed": ratio(graphs, name),
            "times_faster_attention": ratio(alone, name),
            "failed": {**failed, **failed_alone, **failed_graphs},
        })  # fmt: skip
        print(rows[-1], kernels, flush=True)
    return rows


def cached(cache, layer):
    return sum(kept.numel() * kept.element_size() for kept in cache.of(layer).grown.values())


def ratio(times, name):
    """How many times as fast as with a key-value head for every head."""
    many = times.get(f"{HEADS}")
    return many / times[name] if many and name in times else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for context in CONTEXTS:
        rows += measure(context)
        torch.cuda.empty_cache()
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "shape": {"batch": BATCH, "heads": HEADS, "dim": DIM, "dtype": "bfloat16"},
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
