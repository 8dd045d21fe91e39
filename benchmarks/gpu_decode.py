"""Decoding with a long cache: a plain model against the same one steered by three edits in every layer.

The host launches every kernel and is what a token waits for, and its speed changes by a factor of two within seconds.
So tokens are taken in turn: one of the plain model, one of a copy that shares its weights and is under `attend`.
"""

import copy
import gc
import statistics
import time
from contextlib import nullcontext

import torch
from gpu_kernels import segments_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

import headwise as hw

NAMES = tuple(f"part {n}" for n in range(16))
STEPS = 24
# PyTorch's first choice is cuDNN's attention, which plans anew for every length; flash is faster here.
FAST = SDPBackend.FLASH_ATTENTION


def steering(heads=32):
    return [
        hw.ScoreBias(keys="part 3", value=0.7, heads=list(range(heads // 2))),
        hw.Reweight(rule=lambda masses: 1.5 - masses, groups=("part 1", "part 5"), heads=list(range(8, 24))),
        hw.HeadGain(gain=0.5, heads=[5, 17]),
    ]


def steered(model, tokens):
    """The context in which all three edits are active in every layer."""
    labels = torch.cat([segments_of(tokens)[0].long().cpu(), torch.full((4096,), 15)])
    return hw.attend(model, edits=steering(), segments=hw.Segments(NAMES, labels))


def filled_cache(model, tokens):
    g, made = torch.Generator("cuda").manual_seed(0), DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        k, v = (torch.randn(1, 8, tokens, 128, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(2))
        made.update(k, v, layer)
    return made


def twin(model):
    """A copy of the modules with the same weights."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


@torch.no_grad()
def token_by_token(model, tokens, count=300):
    """The median token of each way. Every token ends when the GPU is done with it, as in `generate`, which must look at
    it; `host_ms` is the time of the thread."""
    models = {"plain": model, "steered": twin(model)}
    caches = {kind: filled_cache(model, tokens) for kind in models}
    last = {kind: torch.zeros(1, 1, dtype=torch.long, device="cuda") for kind in models}
    wall, host = ({kind: [] for kind in models} for _ in range(2))
    with sdpa_kernel(FAST), steered(models["steered"], tokens):
        for number in range(count + 20):
            for kind, which in models.items():
                begin, thread = time.perf_counter(), time.thread_time()
                logits = which(last[kind], past_key_values=caches[kind], use_cache=True).logits
                last[kind] = logits[:, -1:].argmax(-1)
                torch.cuda.synchronize()
                if number >= 20:
                    wall[kind].append((time.perf_counter() - begin) * 1e3)
                    host[kind].append((time.thread_time() - thread) * 1e3)
    pairs = [plain / edited for plain, edited in zip(wall["plain"], wall["steered"], strict=True)]
    plain = statistics.median(wall["plain"])
    rows = []
    for kind, times in wall.items():
        middle = statistics.median(times)
        rows.append({
            "case": f"decode: {kind}", "tokens": tokens, "tokens_per_s": 1e3 / middle, "against_plain": plain / middle,
            "ms": middle, "host_ms": statistics.median(host[kind]), "timed": count,
        })  # fmt: skip
    rows[-1]["quartiles_of_pairs"] = statistics.quantiles(pairs)
    return rows


@torch.no_grad()
def generate(model, past, steps):
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    for _ in range(steps):
        token = model(token, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()


def in_turns(model, tokens, turns=6):
    """For reference: tokens a second of the middle and the fastest turn, each some tokens of one way on one model. The
    first turn is not counted, and as in `timeit` Python's garbage collector pauses."""
    ways = {
        "plain": lambda: sdpa_kernel(FAST),
        "steered": lambda: steered(model, tokens),
        "plain, PyTorch's choice": nullcontext,
    }
    kinds = tuple(ways)
    caches = {kind: filled_cache(model, tokens) for kind in kinds}
    speeds = {kind: [] for kind in kinds}
    for turn in range(turns + 1):
        # The last kind is slow and of less interest.
        for kind in kinds[: 2 if turn % 3 else 3]:
            with ways[kind]():
                generate(model, caches[kind], 3)
                gc.disable()
                begin = time.perf_counter()
                generate(model, caches[kind], STEPS)
                seconds = time.perf_counter() - begin
                gc.enable()
            if turn:
                speeds[kind].append(STEPS / seconds)
    middle, fastest = ({kind: f(x) for kind, x in speeds.items()} for f in (statistics.median, max))
    return [
        {"case": f"decode, turns of {STEPS}: {kind}", "tokens": tokens, "tokens_per_s": middle[kind],
         "against_plain": middle[kind] / middle["plain"], "fastest_tokens_per_s": fastest[kind],
         "fastest_against_plain": fastest[kind] / fastest["plain"], "turns": len(speeds[kind])}
        for kind in kinds
    ]  # fmt: skip
