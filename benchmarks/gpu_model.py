"""A model of Llama-3.1-8B's shape, random weights: prefill plain against scanned, decode plain against steered."""

import time
from contextlib import nullcontext

import torch
from gpu_kernels import segments_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import headwise as hw

NAMES = tuple(f"part {n}" for n in range(16))
FASTEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
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


def segments(tokens):
    return hw.Segments(NAMES, segments_of(tokens)[0].long())


def attending(kind, tokens):
    """The context of one way to run the model."""
    if kind == "full scan":
        readings = [hw.Mass(per="head"), hw.Entropy(per="head")]
    elif kind == "256 sampled queries":
        readings = [hw.Mass(per="head", queries=256), hw.Entropy(per="head", queries=256)]
    else:
        return nullcontext
    return lambda model: hw.attend(model, readings=readings, segments=segments(tokens))


@torch.no_grad()
def prefill(model, tokens, kind, rounds):
    """Seconds (best of the rounds; the first is not counted) and peak memory of one forward with a cache."""
    ids = torch.randint(0, 128256, (1, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    enter, seconds, explained = attending(kind, tokens), [], None
    torch.cuda.empty_cache()
    for _ in range(rounds + 1):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with sdpa_kernel(FASTEST, set_priority=True) if "flash" not in kind else nullcontext():
            if enter is nullcontext:
                model(ids, use_cache=True, logits_to_keep=1)
            else:
                with enter(model) as run:
                    model(ids, use_cache=True, logits_to_keep=1)
                explained = run.explain().splitlines()[:6]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30
    row = {"case": f"prefill: {kind}", "tokens": tokens, "seconds": min(seconds[1:]), "peak_gib": peak}
    return row | ({"explain": explained} if explained else {})


def steering(tokens):
    return [
        hw.ScoreBias(keys="part 3", value=0.7, heads=list(range(16))),
        hw.Reweight(rule=lambda masses: 1.5 - masses, groups=("part 1", "part 5"), heads=list(range(8, 24))),
        hw.HeadGain(gain=0.5, heads=[5, 17]),
    ]


@torch.no_grad()
def decode(model, tokens, steered, rounds=3):
    """Tokens a second with a cache of `tokens` keys."""
    g = torch.Generator("cuda").manual_seed(0)

    def cache():
        made = DynamicCache()
        for layer in range(model.config.num_hidden_layers):
            k, v = (torch.randn(1, 8, tokens, 128, device="cuda", dtype=torch.bfloat16, generator=g) for _ in range(2))
            made.update(k, v, layer)
        return made

    past = cache()
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    speeds = []
    labels = torch.cat([segments_of(tokens)[0].long().cpu(), torch.full((4096,), 15)])
    enter = hw.attend(model, edits=steering(tokens), segments=hw.Segments(NAMES, labels)) if steered else nullcontext()
    with enter:
        for _ in range(rounds + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(STEPS):
                out = model(token, past_key_values=past, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            speeds.append(STEPS / (time.perf_counter() - begin))
    return {"case": "decode: " + ("steered" if steered else "plain"), "tokens": tokens, "tokens_per_s": max(speeds[1:])}


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


def run(keep, lengths=(32768, 131072), rounds=2):
    """Every row goes to `keep` as soon as it is known."""
    model = llama()
    for tokens in lengths:
        for kind in ("plain", "full scan", "256 sampled queries"):
            keep([prefill(model, tokens, kind, rounds if tokens < 100_000 else 1)])
    for steered in (False, True):
        keep([decode(model, 32768, steered)])
    del model
    torch.cuda.empty_cache()
    keep([eager(131072)])
