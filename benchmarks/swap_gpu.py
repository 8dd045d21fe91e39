"""Fast paths of the swap room on a GPU: errors against float64, times beside PyTorch's kernels. One command:

    python benchmarks/swap_gpu.py [--out benchmarks/results/swap_h100.json] [--only sigmoid] [--sizes 4096 16384]

Every case is timed at its own steady clock (`gpu_timing.py`); ratios are of one run.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
from gpu_timing import alternate, teraflops

from headwise import swap
from headwise.swap import multi_token as multi_token_module
from headwise.swap.kernels.multi_token import multi_token_attention
from headwise.swap.kernels.phase import phase_attention
from headwise.swap.kernels.routed import routed_attention
from headwise.swap.kernels.sigmoid import sigmoid_attention

HEADS, DIM = 16, 128


def inputs(tokens, heads=HEADS, kv_heads=HEADS, dim=DIM, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(1, n, tokens, dim, generator=generator, device="cuda", dtype=torch.float32)
        .to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    ]  # fmt: skip


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def sigmoid_reference(q, k, v, scale, b, causal, offset):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    p = torch.sigmoid(q @ k.mT * scale + b)
    if causal:
        rows = torch.arange(q.shape[2], device=q.device)[:, None] + offset
        p = p * (torch.arange(k.shape[2], device=q.device) <= rows)
    return p @ v


def sigmoid_errors():
    """Relative errors of output and gradients in bf16, float64 as the truth; b = -log n."""
    rows = []
    for heads, kv_heads, queries, keys, dim, causal, offset in (
        (4, 4, 1024, 1024, 128, True, 0), (4, 4, 1024, 1024, 128, False, 0), (8, 2, 1000, 1000, 128, True, 0),
        (8, 2, 700, 1333, 64, True, 633), (4, 1, 333, 1025, 64, False, 0), (4, 2, 2049, 2049, 128, True, 0),
    ):  # fmt: skip
        q = inputs(queries, heads, heads, dim)[0]
        k, v = inputs(keys, heads, kv_heads, dim, seed=1)[1:]
        b = -torch.tensor(float(keys)).log().item() + 2
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        out = sigmoid_attention(*given, dim**-0.5, b, causal, offset)
        do = torch.randn_like(out)
        grads = torch.autograd.grad(out, given, do)
        again = torch.autograd.grad(sigmoid_attention(*given, dim**-0.5, b, causal, offset), given, do)
        true = [x.detach().double().requires_grad_() for x in (q, k, v)]
        wanted = sigmoid_reference(*true, dim**-0.5, b, causal, offset)
        true_grads = torch.autograd.grad(wanted, true, do.double())
        shape = [heads, kv_heads, queries, keys, dim, causal]
        errors = [error(a, t) for a, t in zip((out, *grads), (wanted, *true_grads))]
        rows.append({
            "shape": shape, "errors": dict(zip("out dq dk dv".split(), errors)),
            "same_twice": all(torch.equal(a, t) for a, t in zip(grads, again)),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def library(backend, q, k, v, causal):
    def run():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def backwards(run, inputs, do):
    out = run()
    return lambda: torch.autograd.grad(out, inputs, do, retain_graph=True)


def sigmoid_times(sizes):
    rows = []
    for tokens in sizes:
        for causal in (True, False) if tokens <= 32768 else (True,):
            rows += both_ways(tokens, causal)
            torch.cuda.empty_cache()
    return rows


def both_ways(tokens, causal):
    q, k, v = (x.requires_grad_() for x in inputs(tokens))
    b = -torch.tensor(float(tokens)).log().item()
    cases = {
        "flash": library(SDPBackend.FLASH_ATTENTION, q, k, v, causal),
        "cudnn": library(SDPBackend.CUDNN_ATTENTION, q, k, v, causal),
        "sigmoid": lambda: sigmoid_attention(q, k, v, DIM**-0.5, b, causal),
    }
    with torch.no_grad():
        forward = row("forward", tokens, causal, *alternate(cases), 1.0)
    do = torch.randn_like(q)
    cases = {name: backwards(run, (q, k, v), do) for name, run in cases.items()}
    return [forward, row("backward", tokens, causal, *alternate(cases), 2.5)]


def row(way, tokens, causal, times, failed, work):
    found = {
        "way": way, "tokens": tokens, "causal": causal, "heads": HEADS, "dim": DIM, "ms": times, "failed": failed,
        "tflops": {n: work * teraflops(HEADS, DIM, tokens, tokens, causal, ms) for n, ms in times.items()},
        "times_of_flash": {n: ms / times["flash"] for n, ms in times.items() if "flash" in times},
    }  # fmt: skip
    shown = "  ".join(f"{n} {ms:8.3f} ms {found['tflops'][n]:5.0f}" for n, ms in times.items())
    print(f"{way:9s}{tokens:7d} {'causal' if causal else 'full':7s} {shown} {failed or ''}", flush=True)
    return found


def phase_reference(q, k, v, alpha):
    half = q.shape[-1] // 2
    gap = torch.arange(q.shape[2], device=q.device)
    gap = (gap[:, None] - gap).abs().to(q)
    power = torch.where(gap > 0, gap**alpha, 0.0)
    phase = q[..., half:] @ k[..., half:].mT * half**-0.5
    s = q[..., :half] @ k[..., :half].mT * half**-0.5 * torch.cos(2 * torch.pi * power * phase)
    return torch.softmax(s.masked_fill(gap.new_ones(gap.shape).triu(1).bool(), float("-inf")), -1) @ v


def phase(sizes):
    """Token-aware phase attention: errors at 1,024 tokens, times beside cuDNN, and beside its dense form in PyTorch."""
    q, k, v = (x.requires_grad_() for x in inputs(1024))
    out, do = phase_attention(q, k, v, DIM // 2, causal=True), torch.randn_like(q)
    true = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = phase_reference(*true, 0.1)
    pairs = zip(
        (out, *torch.autograd.grad(out, (q, k, v), do)), (wanted, *torch.autograd.grad(wanted, true, do.double()))
    )
    found = {"errors": dict(zip("out dq dk dv".split(), (error(a, t) for a, t in pairs))), "times": []}
    print("phase", found["errors"], flush=True)
    for tokens in sizes:
        q, k, v = (x.requires_grad_() for x in inputs(tokens))
        cases = {
            "flash": library(SDPBackend.FLASH_ATTENTION, q, k, v, True),
            "cudnn": library(SDPBackend.CUDNN_ATTENTION, q, k, v, True),
            "phase": lambda q=q, k=k, v=v: phase_attention(q, k, v, DIM // 2, causal=True),
        }
        if tokens <= 8192:
            cases["dense"] = lambda q=q, k=k, v=v: phase_reference(q, k, v, 0.1)
        with torch.no_grad():
            found["times"].append(row("forward", tokens, True, *alternate(cases), 1.0))
        do = torch.randn_like(q)
        cases = {name: backwards(run, (q, k, v), do) for name, run in cases.items()}
        found["times"].append(row("backward", tokens, True, *alternate(cases), 2.5))
        del cases
        torch.cuda.empty_cache()
    return found


def routed(sizes):
    """Heads skipped for the tokens that didn't pick them, by the share of active ones; random choices."""
    rows = []
    for tokens in sizes:
        q, k, v = inputs(tokens)
        cases = {"cudnn": library(SDPBackend.CUDNN_ATTENTION, q, k, v, True)}
        for share in (1.0, 0.75, 0.5, 0.25):
            active = torch.rand(1, tokens, HEADS, device="cuda") < share
            cases[f"active {share:.0%}"] = lambda q=q, k=k, v=v, active=active: routed_attention(
                q, k, v, active, DIM**-0.5, True
            )
        with torch.no_grad():
            rows.append(row("forward", tokens, True, *alternate(cases), 1.0))
    return rows


def learned(groups, taps=(6, 11)):
    """Kernels and mixing matrices of multi-token attention, away from the identity."""
    generator = torch.Generator("cuda").manual_seed(2)
    kernel, mixing = torch.zeros(HEADS, *taps, device="cuda"), torch.eye(HEADS // groups, device="cuda")
    kernel[:, -1, taps[1] // 2] = 1.0
    made = (kernel, mixing.repeat(groups, 1, 1), kernel, mixing.repeat(groups, 1, 1))
    return [
        (x + 0.1 * torch.randn(x.shape, generator=generator, device="cuda")).bfloat16().requires_grad_() for x in made
    ]


def multi_token_reference(q, k, v, pre, pre_mixing, post, post_mixing):
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()

    def slid(x, kernel):
        pad = (kernel.shape[2] // 2, kernel.shape[2] // 2, kernel.shape[1] - 1, 0)
        return F.conv2d(F.pad(x * seen, pad), kernel[:, None], groups=len(kernel))

    def mixed(x, weight):
        return torch.einsum("goc,bgcij->bgoij", weight, x.unflatten(1, weight.shape[:2])).flatten(1, 2)

    s = mixed(slid(q @ k.mT * DIM**-0.5, pre), pre_mixing)
    a = torch.softmax(s.masked_fill(~seen, float("-inf")), -1)
    return mixed(slid(a, post) * seen, post_mixing) @ v


def multi_token(sizes):
    """Multi-token attention, kernels of 6 x 11: "scores" convolves them and no more, "all" convolves scores and weights
    and mixes all heads in both. Errors at 1,024 tokens, times beside cuDNN, and whole layers."""
    own = learned(1)
    given = [x.requires_grad_() for x in (*inputs(1024), *own)]
    out = multi_token_attention(*given[:3], DIM**-0.5, *own, causal=True)
    do = torch.randn_like(out)
    true = [x.detach().double().requires_grad_() for x in given]
    wanted = multi_token_reference(*true)
    pairs = zip((out, *torch.autograd.grad(out, given, do)), (wanted, *torch.autograd.grad(wanted, true, do.double())))
    names = "out dq dk dv dpre_kernel dpre_mixing dpost_kernel dpost_mixing".split()
    found = {"errors": dict(zip(names, (error(a, t) for a, t in pairs))), "times": [], "layers": []}
    print("multi-token", found["errors"], flush=True)
    for tokens in sizes:
        q, k, v = (x.requires_grad_() for x in inputs(tokens))
        cases = {
            "flash": library(SDPBackend.FLASH_ATTENTION, q, k, v, True),
            "cudnn": library(SDPBackend.CUDNN_ATTENTION, q, k, v, True),
            "scores": lambda q=q, k=k, v=v: multi_token_attention(q, k, v, DIM**-0.5, own[0], causal=True),
            "all": lambda q=q, k=k, v=v: multi_token_attention(q, k, v, DIM**-0.5, *own, causal=True),
        }
        with torch.no_grad():
            found["times"].append(row("forward", tokens, True, *alternate(cases), 1.0))
        do = torch.randn_like(q)
        wanted = {"scores": (q, k, v, own[0]), "all": (q, k, v, *own)}
        cases = {name: backwards(run, wanted.get(name, (q, k, v)), do) for name, run in cases.items()}
        found["times"].append(row("backward", tokens, True, *alternate(cases), 2.5))
        del cases
        torch.cuda.empty_cache()
        found["layers"].append(multi_token_layers(tokens))
    return found


def multi_token_layers(tokens):
    """Whole layers without gradients: plain attention, and multi-token attention as the paper has it, in kernels and in
    blocks of rows in PyTorch."""
    x = torch.randn(1, tokens, HEADS * 64, device="cuda", dtype=torch.bfloat16)
    own = dict(causal=True, position=swap.Rope())
    plain = swap.Attention(HEADS * 64, HEADS, **own).cuda().bfloat16()
    layer = swap.MultiTokenAttention(HEADS * 64, HEADS, **own).cuda().bfloat16()

    def in_rows():
        least, multi_token_module.FUSED_PLACES = multi_token_module.FUSED_PLACES, 2**62
        try:
            return layer(x)
        finally:
            multi_token_module.FUSED_PLACES = least

    with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        cases = {"plain": lambda: plain(x), "multi-token": lambda: layer(x)}
        if tokens <= 16384:
            cases["multi-token, rows in PyTorch"] = in_rows
        times, failed = alternate(cases)
        torch.cuda.reset_peak_memory_stats()
        layer(x)
    found = {"tokens": tokens, "ms": times, "failed": failed, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    print("multi-token layer", found, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384, 32768, 65536])
    parser.add_argument("--only", choices=["sigmoid", "phase", "routed", "multi_token"])
    given = parser.parse_args()
    parts = {
        "sigmoid": lambda: {"errors": sigmoid_errors(), "times": sigmoid_times(given.sizes)},
        "phase": lambda: phase(given.sizes),
        "routed": lambda: routed(given.sizes),
        "multi_token": lambda: multi_token(given.sizes),
    }
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    for name, measure in parts.items():
        if given.only in (None, name):
            result[name] = measure()
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
