"""Tables of the documentation that are made from the project itself, so that they can't fall behind it."""

import json

from charts import charts


def write(folder):
    folder.mkdir(exist_ok=True)
    root = folder.parent.parent
    for page in (evidence, questions, roles, steer, swap, swap_reference, swap_tasks, vocabulary, zoo):
        (folder / f"{page.__name__}.md").write_text(page(), encoding="utf-8")
    for room in ("steer", "swap"):
        (folder / f"{room}_studies.md").write_text(studied(room), encoding="utf-8")
    (folder / "costs.md").write_text(costs(root), encoding="utf-8")
    (folder / "swap_bench.md").write_text(swap_bench(root, folder), encoding="utf-8")
    (folder / "swap_kernels.md").write_text(swap_kernels(root), encoding="utf-8")
    (folder / "results.md").write_text(results(root, folder), encoding="utf-8")


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(c) for c in line) + " |" for line in lines) + "\n"


def cell(value):
    return " ".join(str(value).split()).replace("|", "\\|")


def cite(paper):
    return f"[{paper.title}]({paper.url})" if paper.url else paper.title


def evidence():
    """One row a study: claim, verdict, numbers, on what and by which command. Failures included."""
    from headwise.study import studies

    rows = []
    for study in studies():
        finding = study.finding
        if finding is None:
            rows.append([study.claim, cite(study.paper), "unrun", "", f"`headwise study run {study.name}`"])
            continue
        numbers = ", ".join(f"{key} = {short(value)}" for key, value in finding.measured.items())
        seeds = ", ".join(map(str, finding.seeds)) or "none"
        where = f"{finding.model}; {finding.hardware}; seeds {seeds}; `{finding.command}`"
        rows.append([study.claim, cite(study.paper), f"**{finding.verdict}**: {finding.reason}", numbers, where])
    if not rows:
        return "No study has been registered yet.\n"
    return table(["claim", "paper", "verdict", "measured (the paper's expectation: `headwise study show`)", "on"], rows)


def studied(room):
    """The claims of one room's papers, and what was found here, in short."""
    from headwise.study import studies

    rows = [
        [cite(s.paper), s.claim, f"**{s.finding.verdict}**" if s.finding else "unrun", f"`{s.name}`"]
        for s in studies() if s.room == room
    ]  # fmt: skip
    return table(["paper", "claim", "here", "`headwise study show`"], rows)


def short(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(short(v) for v in value[:6]) + (", ...]" if len(value) > 6 else "]")
    return json.dumps(value) if isinstance(value, dict) else str(value)


def questions():
    """A table of the core questions, one of the others; a row a column."""
    from headwise.scan import CORE, QUESTIONS

    parts = []
    for title, kinds in (("Core", CORE), ("All the others", [kind for kind in QUESTIONS if kind not in CORE])):
        rows = []
        for kind in kinds:
            question = kind()
            for place, column in enumerate(question.columns()):
                named = [f"`{question.name}` ({kind.__name__})", cite(question.paper)] if place == 0 else ["", ""]
                rows.append([named[0], f"`{column.name}`", column.what, column.unit, named[1]])
        parts.append(f"### {title}\n\n{table(['question', 'column', 'what it measures', 'unit', 'paper'], rows)}")
    return "\n".join(parts)


def costs(root):
    """What benchmarks/scan_questions.py stored."""
    path = root / "benchmarks" / "results" / "scan_questions.json"
    if not path.exists():
        return "No costs are stored yet.\n"
    stored = json.loads(path.read_text(encoding="utf-8"))
    rows = stored.pop("questions")
    head = {"question": "question", "asked of": "asked of", "passes": "passes of its own", "tokens": "tokens",
            "seconds": "processor seconds"}  # fmt: skip
    facts = "; ".join(f"{key}: {value}" for key, value in stored.items() if key != "command")
    body = [[f"`{row['question']}`", *(row[key] for key in list(head)[1:])] for row in rows]
    total = sum(row["seconds"] for row in rows)
    return (
        f"Measured by `{stored['command']}`. {facts}. All together {total:.0f} s.\n\n{table(list(head.values()), body)}"
    )


def roles():
    from headwise.scan.roles import MIXED, ROLES
    from headwise.scan.vocabulary import STAGES

    return table(["role", "rule", "stage"], [[r.name, r.rule, STAGES.get(r.stage, "")] for r in (*ROLES, MIXED)])


def steer():
    from headwise.steer import METHODS

    return table(["method", "what it does", "paper"], [[f"`{m.__name__}`", m.what, cite(m.paper)] for m in METHODS])


def swap():
    from headwise.swap import MECHANISMS

    rows = [
        [f"`{name}`", m.what, "yes" if m.causal_too else "no", "yes" if m.context_too else "no", cite(m.paper)]
        for name, m in MECHANISMS.items()
    ]
    return table(["mechanism", "what it does", "causal", "cross", "paper"], rows)


def swap_reference():
    """Everything public of the swap room: functions and helpers, mechanisms, parts."""
    from headwise import swap

    kinds = (swap.Score, swap.Normaliser, swap.Position)
    groups = {"Making and converting": [], "Mechanisms": [], "Parts": []}
    for name in swap.__all__:
        value = getattr(swap, name)
        if not callable(value):
            continue  # MECHANISMS: the catalogue, whose table is on the page of the room
        directive = "autoclass" if isinstance(value, type) else "autofunction"
        title = "Making and converting"
        if directive == "autoclass" and value in swap.MECHANISMS.values():
            title = "Mechanisms"
        elif directive == "autoclass" and issubclass(value, kinds):
            title = "Parts"
        groups[title].append(f".. {directive}:: headwise.swap.{name}")
    parts = ["\n".join([title, "-" * len(title), *lines]) for title, lines in groups.items()]
    return "```{eval-rst}\n" + "\n\n".join(parts) + "\n```\n"


def swap_tasks():
    from headwise.study.bench_tasks import TASKS

    rows = [
        [
            f"`{name}`",
            " ".join(task.__doc__.split()).replace("`", ""),
            "decoder" if task.causal else "encoder",
            task.metric,
        ]
        for name, task in TASKS.items()
    ]
    return table(["task", "what it is", "host", "quality"], rows)


def swap_bench(root, folder):
    """What `headwise swap bench --out benchmarks/results/swap_bench.json` stored: a table a task, and the curves."""
    path = root / "benchmarks" / "results" / "swap_bench.json"
    if not path.exists():
        out = "--out benchmarks/results/swap_bench.json"
        return (
            f"No run is stored yet; `headwise swap bench --mechanisms all --tasks recall,relations {out}` makes one.\n"
        )
    import pandas as pd

    from headwise.study.bench_plot import plot
    from headwise.study.bench_tasks import TASKS
    from headwise.study.swap_bench import COLUMNS, read, summary

    run = read(path)
    runs = pd.DataFrame(run["runs"], columns=COLUMNS)
    setup = ", ".join(f"{key} {value}" for key, value in run["setup"].items())
    parts = [f"`{run['command']}`\n\n{setup}; {run['hardware']}; torch {run['versions']['torch']}."]
    plot(runs, folder / "swap_bench.svg")
    parts.append("![Learning curves of the stored run](_generated/swap_bench.svg)")
    for task, group in summary(runs).groupby("task", sort=False):
        better = "higher" if TASKS[task].higher_is_better else "lower"
        rows = []
        for r in group.itertuples():
            spread = f" ± {r.spread:.3f}" if r.seeds > 1 else ""
            numbers = [f"{r.quality:.3f}{spread}", f"{r.gain:+.3f}", f"{r.parameters:,.0f}", f"{r.processor_ms:.1f}",
                       f"{r.memory_mb:.1f}"] if r.seeds else [""] * 5  # fmt: skip
            rows.append([f"`{r.mechanism}`", *numbers, r.note])
        parts.append(f"`{task}` ({TASKS[task].metric}, {better} is better; chance {TASKS[task]().chance:.3f}):")
        parts.append(table(["mechanism", "mean ± sd", "gain", "parameters", "processor ms", "MB", "note"], rows))
    return "\n\n".join(parts)


def swap_kernels(root):
    """The stored run of `benchmarks/swap_gpu.py`: every case's time, and as a multiple of PyTorch's kernels."""
    path = root / "benchmarks" / "results" / "swap_h100.json"
    if not path.exists():
        return "No run is stored yet.\n"
    run = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name, times in (
        ("sigmoid", run["sigmoid"]["times"]), ("phase", run["phase"]["times"]), ("routed", run["routed"]),
        ("multi-token", run["multi_token"]["times"]),
    ):  # fmt: skip
        for row in times:
            for case, ms in row["ms"].items():
                against = [f"{ms / row['ms'][k]:.2f}" if k in row["ms"] else "" for k in ("flash", "cudnn")]
                kind = "causal" if row["causal"] else "full"
                front = {"routed": "heads skipped: ", "multi-token": "multi-token: "}.get(name, "")
                what = case if case in ("flash", "cudnn") else front + case
                rows.append([what, f"{row['way']}, {kind}", f"{row['tokens']:,}", f"{ms:.3f}", *against])
    for row in run["multi_token"]["layers"]:
        where = ["forward, causal", f"{row['tokens']:,}"]
        rows += [[f"layer, {case}", *where, f"{ms:.3f}", "", ""] for case, ms in row["ms"].items()]
    shown = table(["case", "way", "tokens", "ms", "times flash", "times cuDNN"], rows)
    return f"{run['device']}, torch {run['torch']}, triton {run['triton']}; 16 heads, D = 128, bf16.\n\n{shown}"


def vocabulary():
    """A table a stage: what the survey calls heads, and the column that measures it or comes nearest."""
    from headwise.scan.vocabulary import FUNCTIONS, STAGES

    parts = []
    for stage, title in STAGES.items():
        rows = [[f.name, f.does, f"`{f.column}`", f.nearest and f"only near: {f.nearest}"]
                for f in FUNCTIONS if f.stage == stage]  # fmt: skip
        head = ["head", "what it does", "column", "what the column leaves open"]
        parts.append(f"## {title.capitalize()} ({stage})\n\n{table(head, rows)}")
    return "\n".join(parts)


def zoo():
    from headwise.models.zoo import catalogue

    rows = [[f"`{m.name}`", m.what, f"{m.package} ({m.megabytes} MB)", m.licence] for m in catalogue()]
    return table(["name", "what it is", "package on PyPI", "licence"], rows)


def results(root, folder):
    """The stored benchmark runs: what each says of itself, charts, and its lists of measurements as tables."""
    found = sorted((root / "benchmarks" / "results").glob("*.json"))
    found = [path for path in found if path.stem not in ("swap_bench", "swap_h100")]  # told elsewhere
    parts = [stored(path.stem, json.loads(path.read_text(encoding="utf-8")), folder) for path in found]
    return "\n".join(parts) or "No results are stored yet.\n"


def stored(name, run, folder):
    run = run if isinstance(run, dict) else {"rows": run}
    tables = {key: value for key, value in run.items() if is_table(value)}
    facts = [f"- {key}: {short(value)}" for key, value in run.items() if key not in tables]
    parts = [f"### {name}", "\n".join(facts)]
    for chart, svg in charts(run).items():
        (folder / f"{name}_{chart}.svg").write_text(svg, encoding="utf-8")
        parts.append(f"![{name}: {chart}](_generated/{name}_{chart}.svg)")
    for rows in (group for table_rows in tables.values() for group in alike(table_rows)):
        head = list(
            dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
        )
        parts.append(table(head, [[short(row.get(key, "")) for key in head] for row in rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


def alike(rows):
    """Rows in order, those together that measure the same; one that failed measures what the one before does."""
    groups = {}
    kind = ()
    for row in rows:
        kind = kind if "failed" in row and kind else tuple(sorted(key for key in row if key not in ("explain", "note")))
        groups.setdefault(kind, []).append(row)
    return list(groups.values())


def is_table(value):
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
