"""A model of Llama-3.1-8B's shape, random weights: prefill plain against scanned, then decoding (`gpu_decode.py`)."""

import statistics
import time
from contextlib import nullcontext

import gpu_decode
import torch
from gpu_kernels import segments_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import headwise as hw

NAMES = tuple(f"part {n}" for n in range(16))
FASTEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KINDS = ("plain", "full scan", "256 sampled queries")


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
    keep(gpu_decode.token_by_token(model, 32768))
    keep(gpu_decode.in_turns(model, 32768))
    for tokens, rounds in ((32768, 5), (131072, 2)):
        keep(prefill(model, tokens, rounds))
    del model
    torch.cuda.empty_cache()
    keep([eager(131072)])
