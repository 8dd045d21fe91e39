"""Tables of the documentation that are made from the project itself, so that they can't fall behind it."""

import json


def write(folder):
    folder.mkdir(exist_ok=True)
    root = folder.parent.parent
    for page in (evidence, questions, roles, zoo):
        (folder / f"{page.__name__}.md").write_text(page(), encoding="utf-8")
    (folder / "results.md").write_text(results(root), encoding="utf-8")


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


def short(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(short(v) for v in value[:6]) + (", ...]" if len(value) > 6 else "]")
    return json.dumps(value) if isinstance(value, dict) else str(value)


def questions():
    from headwise.scan import QUESTIONS

    rows = []
    for kind in QUESTIONS:
        question = kind()
        for column in question.columns():
            rows.append([f"`{kind.__name__}`", f"`{column.name}`", column.what, column.unit, cite(question.paper)])
    return table(["question", "column", "what it measures", "unit", "paper"], rows)


def roles():
    from headwise.scan.roles import rules

    return table(["role", "rule"], [[name, rule] for name, rule in rules().items()])


def zoo():
    from headwise.models.zoo import catalogue

    rows = [[f"`{m.name}`", m.what, f"{m.package} ({m.megabytes} MB)", m.licence] for m in catalogue()]
    return table(["name", "what it is", "package on PyPI", "licence"], rows)


def results(root):
    """The stored benchmark runs: what each says of itself, and its lists of measurements as tables."""
    found = sorted((root / "benchmarks" / "results").glob("*.json"))
    parts = [stored(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in found]
    return "\n".join(parts) or "No results are stored yet.\n"


def stored(name, run):
    run = run if isinstance(run, dict) else {"rows": run}
    tables = {key: value for key, value in run.items() if is_table(value)}
    facts = [f"- {key}: {short(value)}" for key, value in run.items() if key not in tables]
    parts = [f"### {name}", "\n".join(facts)]
    for rows in tables.values():
        head = list(
            dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
        )
        parts.append(table(head, [[short(row.get(key, "")) for key in head] for row in rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


def is_table(value):
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
