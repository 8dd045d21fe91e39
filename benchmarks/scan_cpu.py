"""What does it cost to look at every head? SmolLM2-135M on the CPU, each way in a process of its own.

    python benchmarks/scan_cpu.py                        # 512, 2,048 and 4,096 tokens: a few minutes on 2 cores
    python benchmarks/scan_cpu.py --lengths 512 --ways plain all
    python benchmarks/scan_cpu.py --peers ENV/bin/python # a Python with nnsight or transformer_lens, for these ways

All ways read the same tokens with the same weights and return, for every layer, head and query: entropy, mean and mean
squared distance, the largest weight and its place, and the mass on each of 8 segments. "plain" is the same forward call
(scaled dot product attention, logits of the last token only) that returns no statistics: the floor. Times are the best
of the repeats after one warm-up; memory is the peak of the whole process, model included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scan_cpu.json"
LENGTHS = (512, 2048, 4096)
REPEATS = {512: 7, 2048: 5, 4096: 3}
SEGMENTS = 8
WAYS = {
    "plain": "plain forward, no statistics",
    "all": "headwise, all queries",
    "sampled": "headwise, 256 queries",
    "eager": "transformers, output_attentions=True",
    "nnsight": "nnsight, weights read layer by layer",
    "transformer_lens": "TransformerLens, hooks on the pattern",
}
PEERS = ("nnsight", "transformer_lens")


def statistics(weights: Any) -> dict[str, Any]:
    """The same statistics from a dense map [batch, head, query, key]."""
    import torch

    n = weights.shape[-1]
    place = torch.arange(n)
    away = (place[:, None] - place).abs().to(weights.dtype)
    label = torch.nn.functional.one_hot(segment_labels(n), SEGMENTS).to(weights.dtype)
    value, index = weights.max(-1)
    return {
        "entropy": -torch.special.xlogy(weights, weights).sum(-1),
        "distance": torch.einsum("bhij,ij->bhi", weights, away),
        "distance_sq": torch.einsum("bhij,ij->bhi", weights, away**2),
        "top_value": value,
        "top_index": index,
        "mass": weights @ label,
    }


def segment_labels(n: int) -> Any:
    import torch

    return torch.arange(n) * SEGMENTS // n


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(folder: str, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(cores())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def plain(folder: str, ids: Any) -> Callable[[], Any]:
    model = load(folder, "sdpa")
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)


def headwise(folder: str, ids: Any, queries: int | str = "all") -> Callable[[], Any]:
    import headwise as hw

    model = load(folder, "sdpa")
    names = tuple(f"part {n}" for n in range(SEGMENTS))
    segments = hw.Segments(names, segment_labels(ids.shape[1]))
    kinds = (hw.Entropy, hw.Distance, hw.Top, hw.Mass)

    def once() -> Any:
        with hw.attend(model, readings=[kind(queries=queries) for kind in kinds], segments=segments) as run:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return run.tree

    return once


def eager(folder: str, ids: Any) -> Callable[[], Any]:
    model = load(folder, "eager")

    def once() -> Any:
        found = model(input_ids=ids, use_cache=False, logits_to_keep=1, output_attentions=True)
        return [statistics(weights) for weights in found.attentions]

    return once


def nnsight(folder: str, ids: Any) -> Callable[[], Any]:
    from nnsight import NNsight

    model = NNsight(load(folder, "eager"))

    def once() -> Any:
        found = []
        with model.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            for layer in model.model.layers:
                found.append({name: value.save() for name, value in statistics(layer.self_attn.output[1]).items()})
        return found

    return once


def transformer_lens(folder: str, ids: Any) -> Callable[[], Any]:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    model = TransformerBridge.boot_transformers(
        folder, hf_model=load(folder, "eager"), tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
    )

    def once() -> Any:
        found = []
        keep = (lambda name: name.endswith("hook_pattern"), lambda weights, hook: found.append(statistics(weights)))
        model.run_with_hooks(ids, fwd_hooks=[keep], return_type=None)
        return found

    return once


MAKERS: dict[str, Callable[[str, Any], Callable[[], Any]]] = {
    "plain": plain,
    "all": headwise,
    "sampled": lambda folder, ids: headwise(folder, ids, 256),
    "eager": eager,
    "nnsight": nnsight,
    "transformer_lens": transformer_lens,
}


def one(way: str, length: int, folder: str, limit: float) -> None:
    """One way at one length, in this process: prints a line of JSON."""
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (int(limit * 2**30),) * 2)
    ids = torch.randint(100, 40000, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        run = MAKERS[way](folder, ids)
        run()
        times = []
        for _ in range(REPEATS.get(length, 3)):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": min(times), "all_seconds": times, "peak_mb": peak}))


def measure(way: str, length: int, folder: str, python: str, limit: float) -> dict[str, Any]:
    """The same in a fresh process, or why there is no number."""
    command = [python, __file__, "--one", way, str(length), "--folder", folder, "--limit", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"way": way, "what": WAYS[way], "tokens": length}
    if done.returncode == 0:
        return row | json.loads(done.stdout.strip().splitlines()[-1])
    said = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    memory = done.returncode < 0 or "memory" in done.stderr.lower()
    return row | {"failed": f"more than {limit:g} GB of memory" if memory else said}


def has(python: str, package: str) -> bool:
    return subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False).returncode == 0


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {}
    for package in ("headwise", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--peers", default=None, help="a Python that has nnsight or transformer_lens")
    parser.add_argument("--limit", type=float, default=12.0, help="GB of address space a process may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one[0], int(asked.one[1]), asked.folder, asked.limit)
        return
    from headwise.models import pull

    folder = str(pull("zoo:llm")[0])
    peers = asked.peers or sys.executable
    ways = [way for way in asked.ways if way not in PEERS or has(peers, way)]
    rows = []
    print(f"{'tokens':>6}  {'way':<40} {'seconds':>8} {'x plain':>8} {'peak MB':>8}")
    for length in asked.lengths:
        floor = None
        for way in ways:
            row = measure(way, length, folder, peers if way in PEERS else sys.executable, asked.limit)
            if way == "plain":
                floor = row.get("seconds")
            if "seconds" in row:
                row["ratio"] = row["seconds"] / floor if floor else None
                ratio = f"{row['ratio']:.2f}" if floor else "-"
                print(
                    f"{length:>6}  {WAYS[way]:<40} {row['seconds']:>8.2f} {ratio:>8} {row['peak_mb']:>8.0f}", flush=True
                )
            else:
                print(f"{length:>6}  {WAYS[way]:<40} {row['failed']}", flush=True)
            rows.append(row)
            write(asked.out, rows)  # after every row: a run that is stopped keeps what it has
    print(f"wrote {asked.out}")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"model": "SmolLM2-135M-Instruct, float32", "repeats": REPEATS, "machine": machine(), "rows": rows}
    path.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
