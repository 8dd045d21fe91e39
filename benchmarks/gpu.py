"""Benchmark on one GPU: a whole model, then the kernels. One command, JSON out, a table at the end.

PYTHONPATH=src python benchmarks/gpu.py --out benchmarks/results/gpu.json
"""

import argparse
import json
import time
from pathlib import Path

import gpu_kernels
import gpu_model
import torch
import triton

LENGTHS = {"llama-8b": (4096, 16384, 65536, 131072), "smol-135m": (4096, 16384, 65536)}


def table(rows):
    for row in rows:
        number = row.get("ms", row.get("seconds", row.get("tokens_per_s")))
        unit = "ms" if "ms" in row else "s" if "seconds" in row else "tokens/s" if "tokens_per_s" in row else ""
        more = f"{row['tflops']:6.0f} TFLOP/s  {row['against_cudnn']:5.2f} x cuDNN" if "tflops" in row else ""
        more += f"{row['against_plain']:5.3f} x plain  " if "against_plain" in row else ""
        more += f"fastest turn {row['fastest_against_plain']:5.3f} x plain  " if "fastest_against_plain" in row else ""
        more += f"chip alone {row['chip_ms']:.3f} ms  " if "chip_ms" in row else ""
        more += f"peak {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
        if row["case"] == "relative error":
            more = "  ".join(f"{k} {v:.2e}" for k, v in row.items() if isinstance(v, float))
        what = "failed: " + row["failed"] if "failed" in row else f"{number:10.3f} {unit}" if number else ""
        print(f"{row.get('shape', 'model'):10} {row['tokens']:7} {row['case']:48} {what} {more}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["kernels", "model"])
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out (it compiles for each length)")
    options = parser.parse_args()
    begin, rows = time.time(), []
    chip = torch.cuda.get_device_properties(0)
    found = {
        "device": chip.name, "multiprocessors": chip.multi_processor_count, "memory_gib": chip.total_memory / 2**30,
        "torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version(), "rows": rows,
    }  # fmt: skip

    def keep(new):
        rows.extend(new)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1))
        print(f"[{time.time() - begin:.0f} s] {new[-1]['tokens']} tokens", flush=True)

    if options.only != "kernels":
        gpu_model.run(keep)
    if options.only != "model":
        keep([gpu_kernels.accuracy("llama-8b", 16384)])
        keep(gpu_kernels.decode("llama-8b", 32768, 3))
        for shape, lengths in LENGTHS.items():
            for length in lengths:
                keep(gpu_kernels.prefill(shape, length, 3, shape == "llama-8b" and not options.no_flex))
    table(rows)


if __name__ == "__main__":
    main()
