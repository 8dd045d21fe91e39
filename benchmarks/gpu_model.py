"""A model of Llama-3.1-8B's shape, random weights: prefill plain against scanned, decode plain against steered."""

import gc
import statistics
import time
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from gpu_kernels import segments_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import headwise as hw

NAMES = tuple(f"part {n}" for n in range(16))
FASTEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KINDS = ("plain", "full scan", "256 sampled queries")
STEPS = 24


def llama(layers=32, attention="sdpa"):
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def attending(model, kind, tokens):
    """The context of one way to run the model."""
    if kind == "plain":
        return nullcontext()
    queries = "all" if kind == "full scan" else 256
    readings = [hw.Mass(per="head", queries=queries), hw.Entropy(per="head", queries=queries)]
    return hw.attend(model, readings=readings, segments=hw.Segments(NAMES, segments_of(tokens)[0].long()))


@torch.no_grad()
def prefill(model, tokens, rounds):
    """Seconds and peak memory of one forward with a cache: the ways take turns, the first turn is not counted."""
    ids = torch.randint(0, 128256, (1, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    seconds, peaks, explained = {k: [] for k in KINDS}, {}, {}
    for turn in range(rounds + 1):
        for kind in KINDS:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with sdpa_kernel(FASTEST, set_priority=True), attending(model, kind, tokens) as run:
                model(ids, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            if turn:
                seconds[kind].append(time.perf_counter() - begin)
            peaks[kind] = torch.cuda.max_memory_allocated() / 2**30
            if run is not None:
                explained[kind] = run.explain().splitlines()[:2]
    plain = statistics.median(seconds["plain"])
    return [
        {
            "case": f"prefill: {kind}", "tokens": tokens, "seconds": statistics.median(seconds[kind]),
            "against_plain": statistics.median(seconds[kind]) / plain, "peak_gib": peaks[kind],
            "peak_against_plain": peaks[kind] / peaks["plain"],
        } | ({"explain": explained[kind]} if kind in explained else {})
        for kind in KINDS
    ]  # fmt: skip


def steering(heads=32):
    return [
        hw.ScoreBias(keys="part 3", value=0.7, heads=list(range(heads // 2))),
        hw.Reweight(rule=lambda masses: 1.5 - masses, groups=("part 1", "part 5"), heads=list(range(8, 24))),
        hw.HeadGain(gain=0.5, heads=[5, 17]),
    ]


def filled_cache(model, tokens):
    g, made = torch.Generator("cuda").manual_seed(0), DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        k, v = (torch.randn(1, 8, tokens, 128, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(2))
        made.update(k, v, layer)
    return made


@contextmanager
def decoding(model, tokens, kind):
    """One way to decode; "steered" has all three edits active in every layer."""
    labels = torch.cat([segments_of(tokens)[0].long().cpu(), torch.full((4096,), 15)])
    with ExitStack() as stack:
        if kind == "plain":
            # PyTorch's first choice is cuDNN's attention, which plans anew for every length; flash is faster here.
            stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        if kind == "steered":
            stack.enter_context(hw.attend(model, edits=steering(), segments=hw.Segments(NAMES, labels)))
        yield


@torch.no_grad()
def generate(model, past, steps):
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    for _ in range(steps):
        token = model(token, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()


def decode(model, tokens, turns=30):
    """Tokens a second with a cache of `tokens` keys, in the middle turn and in the fastest. The host launches every
    kernel of all ways and is what they wait for; its speed changes with what else it does, so the ways take turns. The
    first turn is not counted, and as in `timeit` Python's garbage collector pauses."""
    kinds = ("plain", "steered", "plain, PyTorch's choice")
    caches = {kind: filled_cache(model, tokens) for kind in kinds}
    speeds = {kind: [] for kind in kinds}
    for turn in range(turns + 1):
        # The last kind is slow and of less interest.
        for kind in kinds[: 2 if turn % 5 else 3]:
            with decoding(model, tokens, kind):
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
        {"case": f"decode: {kind}", "tokens": tokens, "tokens_per_s": middle[kind],
         "against_plain": middle[kind] / middle["plain"], "fastest_tokens_per_s": fastest[kind],
         "fastest_against_plain": fastest[kind] / fastest["plain"], "turns": len(speeds[kind])}
        for kind in kinds
    ]  # fmt: skip


@torch.no_grad()
def eager(tokens):
    """The plain route to the same statistics: attention weights from an eager model. Two layers are enough."""
    model = llama(layers=2, attention="eager")
    ids = torch.zeros(1, tokens, dtype=torch.long, device="cuda")
    try:
        model(ids, output_attentions=True, use_cache=False, logits_to_keep=1)
        peak = torch.cuda.max_memory_allocated() / 2**30
        return {"case": "prefill: eager, weights returned", "tokens": tokens, "peak_gib": peak}
    except torch.OutOfMemoryError as error:
        return {"case": "prefill: eager, weights returned", "tokens": tokens, "failed": str(error).split(". ")[0]}


def run(keep):
    """All cases of the model; `keep` stores their rows as they come."""
    model = llama()
    keep(decode(model, 32768))
    for tokens, rounds in ((32768, 5), (131072, 3)):
        keep(prefill(model, tokens, rounds))
    del model
    torch.cuda.empty_cache()
    keep([eager(131072)])
