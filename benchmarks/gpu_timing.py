"""Timing and counting for the GPU benchmarks."""

import torch

TURN_MS = 160.0


def alternate(cases, rounds=3):
    """Median milliseconds of every case, and why the others failed.

    Cases take turns. In its turn a case runs for TURN_MS before it is timed for TURN_MS: the chip lowers its clock
    under load, and a case must be timed at its own steady clock, not at what the case before it left behind.
    """
    times, repeats, failed = {}, {}, {}
    for name, run in cases.items():
        try:
            run()
            torch.cuda.synchronize()
            repeats[name] = max(1, round(TURN_MS / max(once(run, 1), 1e-2)))
            times[name] = []
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, seen in times.items():
            once(cases[name], repeats[name])
            seen.append(once(cases[name], repeats[name]))
    return {name: sorted(seen)[len(seen) // 2] for name, seen in times.items()}, failed


def once(run, repeats):
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(repeats):
        run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / repeats


def graphed(run):
    """The same work as one CUDA graph, captured at the first call: without the host's part."""
    graphs = []

    def replay():
        if not graphs:
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs.append(graph)
        graphs[0].replay()

    return replay


def teraflops(heads, dim, queries, keys, causal, milliseconds):
    """Multiplications and additions of both products; half of them where causal."""
    return 4 * heads * dim * queries * keys * (0.5 if causal else 1.0) / milliseconds / 1e9
