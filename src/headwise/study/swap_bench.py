"""The test bench of the swap room: small models around any mechanism, trained alike, always beside softmax attention.

    runs = bench("sigmoid_attention,attention:position=Rope", tasks="lm,recall", seeds=3)    # pandas, a row a run
    summary(runs)                                                                # a row a mechanism and task

All models of a task see the same batches (of a seed) in the same order, under the same recipe (`Setup`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwise.errors import HeadwiseError
from headwise.files import check_writable, replacing
from headwise.scan.progress import Report, reporting
from headwise.study.bench_run import Job, Setup, forecast, train_one
from headwise.study.bench_specs import BASELINE, Spec, Wanted, specs_of
from headwise.study.bench_tasks import TASKS
from headwise.study.finding import hardware, versions

if TYPE_CHECKING:
    import pandas as pd


def bench(
    mechanisms: str | Sequence[Wanted] = "all",
    tasks: str | Sequence[str] = ("lm", "recall"),
    *,
    seeds: int = 3,
    jobs: int = 1,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | Report | None = None,
    command: str = "",
    **setup: Any,
) -> pd.DataFrame:
    """Trains every mechanism on every task from every seed; a row a run.

    `mechanisms`: names with settings (`bench_specs`) or classes; softmax attention is always among them. `tasks`: of
    `bench_tasks.TASKS`. `setup`: fields of `Setup` (params, steps, lr, dim, layers, device). `jobs`: so many processes.
    `out`: a JSON file, written after every run; `resume` goes on with it: runs that it has are not made again, those
    that failed are. `progress`: True says the cost first, from a short calibration, and shows a bar.

    Columns: mechanism, task, seed, quality (None with the reason in `note`), parameters, step_ms and processor_ms
    (medians; comparable within one bench), memory_mb (`bench_run.step_memory`), curve ([step, quality] on what is held
    out).
    """
    import pandas as pd

    specs, chosen, same = specs_of(mechanisms), tasks_of(tasks), Setup(**setup)
    if seeds < 1 or jobs < 1:
        raise HeadwiseError(f"seeds and jobs: at least 1; got seeds={seeds}, jobs={jobs}.")
    check(specs, chosen, same)
    rows = begin(out, resume, same)
    done = {(row["mechanism"], row["task"], row["seed"]) for row in rows}
    todo = [(s, t, seed) for t in chosen for s in specs for seed in range(seeds) if (s.label, t, seed) not in done]
    plan = f"{len(todo)} runs of {same.steps} steps"
    if progress and todo:
        plan += f": about {words(forecast(todo, same) / min(jobs, len(todo)))}"
    about = {"command": command, "setup": asdict(same), "hardware": hardware(), "versions": versions()}
    with reporting(progress, plan, len(todo)) as report:
        report(0, len(todo), "the first run")
        for number, row in enumerate(finished(todo, same, jobs), 1):
            rows.append(row)
            if out is not None:
                write(out, {**about, "runs": rows})
            report(number, len(todo), f"{row['mechanism']} on {row['task']}, seed {row['seed']}")
    order = {spec.label: n for n, spec in enumerate(specs)}
    rows.sort(key=lambda r: (list(TASKS).index(r["task"]), order.get(r["mechanism"], len(order)), r["seed"]))
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = [
    "mechanism",
    "task",
    "seed",
    "quality",
    "parameters",
    "step_ms",
    "processor_ms",
    "memory_mb",
    "curve",
    "note",
]


def tasks_of(tasks: str | Sequence[str]) -> list[str]:
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    wrong = [name for name in names if name not in TASKS]
    if wrong or not names:
        raise HeadwiseError(f"tasks: of {', '.join(TASKS)}; got {', '.join(wrong) or 'none'}.")
    return list(dict.fromkeys(names))


def check(specs: list[Spec], tasks: list[str], setup: Setup) -> None:
    """Refuses before the first run what can't be made at all: wrong settings, sizes that don't fit, a missing extra."""
    for task in (TASKS[name]() for name in tasks):
        for spec in specs:
            if spec.kind.causal_too or not task.causal:
                spec.make(setup.dim, setup.heads, task.causal)


def finished(todo: list[Job], setup: Setup, jobs: int) -> Iterator[dict[str, Any]]:
    """The rows as they come. Processes share this one's threads."""
    if jobs == 1:
        yield from (train_one(*job, setup) for job in todo)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,))
    try:
        yield from (future.result() for future in as_completed([pool.submit(train_one, *job, setup) for job in todo]))
    except BrokenProcessPool:
        raise HeadwiseError(
            "jobs: a process died before its run was done: out of memory, or a script that calls bench outside of "
            "`if __name__ == '__main__':`."
        ) from None
    finally:  # at an interrupt: what runs is finished, what waits is not begun
        pool.shutdown(cancel_futures=True)


def begin(out: str | Path | None, resume: bool, setup: Setup) -> list[dict[str, Any]]:
    """The rows to go on from."""
    if out is None:
        if resume:
            raise HeadwiseError("resume: from which file? Give out.")
        return []
    path = check_writable(out)
    if not path.exists():
        return []
    if not resume:
        raise HeadwiseError(f"out: {path} is there already: go on with it (resume), or choose another file.")
    stored = read(path)
    other = {k: (stored["setup"].get(k), v) for k, v in asdict(setup).items() if stored["setup"].get(k) != v}
    if other:
        told = ", ".join(f"{key}={was} there and {now} here" for key, (was, now) in other.items())
        raise HeadwiseError(f"resume: {path} holds runs of another setup: {told}.")
    return [row for row in stored["runs"] if not row["note"].startswith("failed")]


def read(path: str | Path) -> dict[str, Any]:
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        stored["setup"].keys(), [row[name] for row in stored["runs"] for name in ("mechanism", "task", "seed", "note")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeadwiseError(f"{path} holds no results of the swap bench: {error!r}.") from None
    return stored


def write(path: str | Path, stored: dict[str, Any]) -> None:
    """Whole or not at all; a run a line, so that versions can be compared."""
    runs = ",\n  ".join(json.dumps(row) for row in stored["runs"])
    head = json.dumps({key: value for key, value in stored.items() if key != "runs"}, indent=1)[:-2]
    with replacing(path) as unfinished:
        unfinished.write_text(f'{head},\n "runs": [\n  {runs}\n ]\n}}\n', encoding="utf-8")


def words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a task and mechanism: mean quality and its standard deviation over the seeds; `gain`, the mean difference
    to softmax attention from the same seed, above 0 where the mechanism is better; medians of time and memory."""
    import pandas as pd

    plain = runs[runs["mechanism"] == BASELINE].set_index(["task", "seed"])["quality"].astype(float)
    rows = []
    for (task, mechanism), group in runs.groupby(["task", "mechanism"], sort=False):
        scored = group.dropna(subset="quality")
        quality = scored["quality"].astype(float)
        against = plain.reindex(pd.MultiIndex.from_frame(scored[["task", "seed"]])).to_numpy()
        sign = 1 if TASKS[task].higher_is_better else -1
        rows.append({
            "task": task, "mechanism": mechanism, "seeds": len(scored), "quality": quality.mean(),
            "spread": quality.std(), "gain": sign * (quality.to_numpy() - against).mean() if len(scored) else None,
            **{name: scored[name].median() for name in ("parameters", "step_ms", "processor_ms", "memory_mb")},
            "note": "; ".join(dict.fromkeys(note for note in group["note"] if note)),
        })  # fmt: skip
    return pd.DataFrame(rows)
