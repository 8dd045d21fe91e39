"""What does steering cost on the CPU? SmolLM2-135M: a token of decoding, and prefill, plain and steered in turn.

    python benchmarks/steer_cpu.py                       # some minutes on one core
    python benchmarks/steer_cpu.py --ways bias gain --lengths 512 --rounds 5

One model, one thread. In every round each way decodes the same tokens after the same prompt, one after the other (the
first token of a way, which works out what stays the same, is not counted); the ratio is the median over the rounds of a
way's seconds a token over the plain model's in the same round. `ratio` is of processor seconds, which other work on the
machine hardly changes; wall seconds stand beside them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import headwise as hw
from headwise import steer

RESULTS = Path(__file__).parent / "results" / "steer_cpu.json"
LENGTHS = (512, 2048)
TOKENS = 8
"""Tokens a way decodes in one round."""
PREFILLS = 5
BUCKETS = steer.AttentionBuckets((1.0, 1.5, 2.0))
THREE = [(layer, head) for layer in (3, 9, 20) for head in range(9)]
WAYS: dict[str, tuple[str, tuple[steer.Method, ...]]] = {
    "plain": ("the model by itself", ()),
    "bias": ("TokenScale(gain=2): a bias on the first token, every head", (steer.TokenScale(gain=2.0),)),
    "emphasis": ("Emphasis: a bias on a span, every head", (steer.Emphasis("span", alpha=0.1),)),
    "gain": ("ScaleHeads: every head of 3 layers", (steer.ScaleHeads(THREE, 0.5),)),
    "gain_all": ("ScaleHeads: every head", (steer.ScaleHeads(gain=0.9),)),
    "reweight": ("SplitSoftmax: the masses of two groups, every head", (steer.SplitSoftmax("span", tau=0.5),)),
    "batch": (f"the model by itself, the prompt {len(BUCKETS.ratios)} times in one batch", ()),
    "buckets": (f"AttentionBuckets: {len(BUCKETS.ratios)} copies in one batch", (BUCKETS,)),
}  # fmt: skip


Times = list[tuple[float, float]]
"""(processor seconds, wall seconds), one a round."""


def measure(opened: hw.Opened, ids: torch.Tensor, ways: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row a way, for one length."""
    length = ids.shape[1] - TOKENS - 1
    parts = hw.Segments.from_spans({"first": (0, 1), "span": (length // 2, length // 2 + 20)}, length)
    prefill: dict[str, Times] = {way: [] for way in ways}
    decode: dict[str, Times] = {way: [] for way in ways}
    given = {way: ids.repeat(len(BUCKETS.ratios) if way == "batch" else 1, 1) for way in ways}
    caches = {}
    for _ in range(PREFILLS):
        for way in ways:
            with under(opened, way, parts), timed(prefill[way], 1):
                out = opened.model(input_ids=given[way][:, :length], use_cache=True, logits_to_keep=1)
            caches[way] = out.past_key_values
    for _ in range(rounds):
        for way in ways:
            with under(opened, way, parts):
                token(opened, given[way], length, caches[way])
                with timed(decode[way], TOKENS):
                    for step in range(1, TOKENS + 1):
                        token(opened, given[way], length + step, caches[way])
            caches[way].crop(-TOKENS - 1)
    return [row(way, length, prefill, decode) for way in ways]


def under(opened: hw.Opened, way: str, parts: hw.Segments) -> AbstractContextManager[Any]:
    methods = WAYS[way][1]
    return steer.apply(opened, *methods, segments=parts) if methods else nullcontext()


def token(opened: hw.Opened, ids: torch.Tensor, place: int, cache: Any) -> None:
    opened.model(input_ids=ids[:, place : place + 1], past_key_values=cache)


@contextmanager
def timed(into: Times, steps: int) -> Iterator[None]:
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    into.append(((time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps))


def row(way: str, length: int, prefill: dict[str, Times], decode: dict[str, Times]) -> dict[str, Any]:
    found: dict[str, Any] = {"way": way, "length": length}
    for name, times in (("prefill", prefill), ("decode", decode)):
        found[f"{name}_ms"] = round(1000 * statistics.median(cpu for cpu, _ in times[way]), 2)
        for n, kind in enumerate(("", "_wall")):
            shares = [mine[n] / plain[n] for mine, plain in zip(times[way], times["plain"], strict=True)]
            found[f"{name}_ratio{kind}"] = round(statistics.median(shares), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    opened = hw.open_model("zoo:llm", device="cpu")
    ways = ["plain", *(way for way in args.ways if way != "plain")]
    rows = []
    for length in args.lengths:
        ids = torch.randint(1000, 40000, (1, length + TOKENS + 1), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            rows += measure(opened, ids, ways, args.rounds)
        for found in rows[-len(ways) :]:
            print(json.dumps(found))
    about = {"model": opened.name, "threads": 1, "rounds": args.rounds, "tokens_a_round": TOKENS}
    about |= {"processor": processor(), "python": platform.python_version()}
    about |= {name: version(name) for name in ("torch", "transformers")}
    whats = {way: WAYS[way][0] for way in ways}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "ways": whats, "rows": rows}, indent=1) + "\n")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
