"""Timing and counting for the GPU benchmarks."""

import torch

BATCH_MS = 4.0


def alternate(cases, rounds=9):
    """Median milliseconds of every case. Cases take turns, so heat and clock changes fall on all of them alike;
    short ones run several times between two events, so that launching them costs no device time."""
    cases, failed, repeats = dict(cases), {}, {}
    for name, run in list(cases.items()):
        try:
            run()
            repeats[name] = max(1, round(BATCH_MS / max(once(run, 1), 1e-3)))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            failed[name] = "out of memory" if "out of memory" in str(error).lower() else str(error).splitlines()[0]
            del cases[name]
        torch.cuda.empty_cache()
    times = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            times[name].append(once(run, repeats[name]))
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}, failed


def once(run, repeats):
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(repeats):
        run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / repeats


def teraflops(heads, dim, queries, keys, causal, milliseconds):
    """Multiplications and additions of both products; half of them where causal."""
    return 4 * heads * dim * queries * keys * (0.5 if causal else 1.0) / milliseconds / 1e9
