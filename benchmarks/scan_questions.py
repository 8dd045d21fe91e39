"""What each question of a scan costs on top of plain forward passes, for zoo:llm and a text of 1,024 tokens.

    OMP_NUM_THREADS=1 python benchmarks/scan_questions.py            # every question
    OMP_NUM_THREADS=1 python benchmarks/scan_questions.py sinks      # some; the other stored rows stay

Processor seconds of this process, not wall-clock time, so that a busy machine changes little. The rows go to
`benchmarks/results/scan_questions.json` for the documentation, the multiples to `headwise/scan/assets/costs.json`, from
which a scan tells its cost before it starts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from headwise import HeadwiseError, open_model, scan
from headwise.scan.needles import haystack
from headwise.scan.needs import quiet
from headwise.scan.run import plan
from headwise.study.finding import hardware, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scan_questions.json"
COSTS = ROOT / "src" / "headwise" / "scan" / "assets" / "costs.json"
TOKENS = 1024


def main(names: list[str]) -> None:
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"questions": []}
    opened = open_model("zoo:llm")
    ids = opened.tokenizer(haystack(), return_tensors="pt")["input_ids"][:, :TOKENS]
    batch = {"input_ids": ids}
    plain = min(processor(lambda: forward(opened, batch)) for _ in range(3))
    # The details of the report are read beside every question about the text: "entropy" asks for nothing more.
    base = min(processor(lambda: scan.heads(opened, inputs=[batch], questions=["entropy"])) for _ in range(2))
    rows = {row["question"]: row for row in stored["questions"]}
    for kind in scan.QUESTIONS:
        question = kind()
        if names and question.name not in names:
            continue
        try:
            own = question.prompts(opened) is not None
            given = {} if own else {"inputs": [batch]}
            made = plan(opened, questions=[question], **given)
            seconds = processor(lambda g=given, q=question: scan.heads(opened, questions=[q], **g))
        except HeadwiseError as error:
            print(f"{question.name}: left out: {error}", file=sys.stderr)
            continue
        mine = [one for one in made.passes if question.name in [q.name for q in one.questions]]
        tokens = sum(one.prompt.tokens for one in mine)
        spent = seconds if own else max(0.0, seconds - base)
        forwards = plain * tokens / TOKENS
        extra = spent / forwards - (1 if own or question.drives else 0)
        rows[question.name] = {
            "question": question.name,
            "asked of": "its own prompts" if own else "your texts",
            "passes": 0 if not own and not question.drives else len(mine),
            "tokens": tokens,
            "seconds": round(spent, 1),
            "forwards": round(extra, 2),
        }
        print(rows[question.name], flush=True)
    known = [kind().name for kind in scan.QUESTIONS]
    kept = [rows[name] for name in known if name in rows]
    facts = {
        "model": opened.name,
        "text": f"{TOKENS} tokens",
        "a plain forward pass": f"{plain:.2f} processor seconds",
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "OMP_NUM_THREADS=1 python benchmarks/scan_questions.py",
    }
    RESULTS.write_text(json.dumps(facts | {"questions": kept}, indent=1) + "\n", encoding="utf-8")
    COSTS.write_text(json.dumps({row["question"]: row["forwards"] for row in kept}, indent=1) + "\n", encoding="utf-8")
    print(f"all: {sum(row['seconds'] for row in kept):.0f} s", file=sys.stderr)


def forward(opened, batch) -> None:
    with torch.no_grad():
        opened.model(**batch, **quiet(opened.model))


def processor(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main(sys.argv[1:])
