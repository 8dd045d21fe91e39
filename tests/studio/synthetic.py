"""A payload as a scan of a small language model makes it, from a seed: the heads have believable habits."""

import math

import numpy as np

RULES = {
    "previous token": "Mean attention to the token before is at least 0.5.",
    "induction": "Prefix matching on repeated random tokens is at least 0.4.",
    "retrieval": "Copies at least 0.1 of hidden answers while the model gives them.",
    "duplicate token": "Attention to earlier copies of a token is at least 0.4.",
    "separator": "Mean attention to punctuation, line breaks and special tokens is at least 0.6.",
    "sink": "Mean attention to the first token is at least 0.3.",
    "local": "At least 0.8 of the attention stays in the local window.",
    "mixed": "None of the other rules holds.",
}
SINK = {"title": "When Attention Sink Emerges in Language Models: An Empirical View", "arxiv": "2410.10781"}
INDUCTION = {"title": "In-context Learning and Induction Heads", "arxiv": "2209.11895"}
SHARE = "share of attention"
QUESTIONS = [  # name, title, what, unit, higher, threshold, paper
    ("sinks", "First-token sinks", "Mean attention to the first token, from every token that can see it.", SHARE,
     "rests on the first token", 0.3, SINK),
    ("entropy", "Entropy", "How evenly the attention is spread over the visible tokens.", "nats",
     "looks at many tokens alike", None, SINK),
    ("distance", "Distance", "Mean number of tokens between a token and what it looks at.", "tokens",
     "looks far back", None, SINK),
    ("previous", "Previous token", "Mean attention to the token before.", SHARE, "looks one back", 0.5, INDUCTION),
    ("separator", "Separators", "Mean attention to punctuation, line breaks and special tokens after the first.",
     SHARE, "looks at separators", 0.6, INDUCTION),
    ("local", "Local window", "Mean attention to tokens at most 16 away.", SHARE, "stays near", 0.8, INDUCTION),
    ("induction_heads", "Induction", "On repeated random tokens: attention to what followed earlier copies of the "
     "current token.", SHARE, "looks for what came next last time", 0.4, INDUCTION),
    ("copy_heads", "Copying heads", "Whether a head raises the logit of the very token it looks at.", "-1 to 1",
     "writes what it reads", 0.0, INDUCTION),
    ("retrieval_heads", "Retrieval", "Share of hidden answers that a head copies while the model gives them.",
     "share of answers", "copies from far back", 0.1, {"title": "Retrieval Head", "arxiv": "2404.15574"}),
]  # fmt: skip
TEXT = (
    "The| keeper| of| the| light| climbed| the| stair| every| evening|,| and| every| evening| the| stair| had| one| "
    "step| more|.|\n|No| one| in| the| village| believed| the| keeper|;| the| keeper| of| the| light| was| old|,| and| "
    "old| men| count| badly|.|\n|But| the| stair| had| one| step| more|,| and| the| keeper| counted| it|."
).split("|")


def payload(layers=30, heads=9, streams=("text",), missing=(), seed=0):
    """`missing`: (layer, head) pairs that no stream has."""
    found = {
        "version": 1,
        "model": {"name": "zoo:llm", "fingerprint": "3f9a1c2e", "parameters": 134_515_008, "headwise": "0.1.0"},
        "created": "2026-11-24T01:10:00+00:00",
        "tokens": 12288,
        "command": "headwise scan zoo:llm --queries 256 --out report.html",
        "streams": [{"name": stream, "layers": list(range(layers)), "heads": heads} for stream in streams],
        "questions": [
            dict(zip(("name", "title", "what", "unit", "higher", "threshold", "paper"), row)) | {"grid": {}, "sem": {}}
            for row in QUESTIONS
        ],
        "left_out": {"VisionHeads": "the model has no vision stream"},
        "roles": {},
        "role_rules": RULES,
        "details": {},
        "sample": {"tokens": TEXT, "rows": {}},
    }
    for number, stream in enumerate(streams):
        add_stream(found, stream, layers, heads, set(missing), np.random.default_rng((seed, number)))
    return found


def many(questions=20, columns=3, **kw):
    """A payload with `questions` x `columns` columns: noisy copies of the usual ones, and a table beside them."""
    found = payload(**kw)
    rng = np.random.default_rng(1)
    usual, found["questions"] = found["questions"], []
    for number in range(questions):
        for place in range(columns):
            one = usual[(number + place) % len(usual)]
            grid = {s: [[x and round(x * rng.uniform(0.8, 1.2), 5) for x in row] for row in g]
                    for s, g in one["grid"].items()}  # fmt: skip
            name = f"question_{number}" if place == 0 else f"question_{number}_column_{place}"
            title = f"{one['title']} {number}" if place == 0 else f"Column {place} of {number}"
            found["questions"].append(
                one | {"name": name, "title": title, "grid": grid, "sem": None, "question": f"question_{number}"}
            )
    names = [str(n) for n in range(12)]
    table = {"title": "Layers", "what": "How alike they are.", "rows": "layer of one", "columns": "layer of the other"}
    values = [[round(math.exp(-abs(i - j) / 4), 4) for j in range(12)] for i in range(12)]
    found["matrices"] = [table | {"row_names": names, "column_names": names, "values": values}]
    return found


def add_stream(found, stream, layers, heads, missing, rng):
    tables = {q["name"]: [[None] * heads for _ in range(layers)] for q in found["questions"]}
    errors = {name: [[None] * heads for _ in range(layers)] for name in tables}
    roles = [[None] * heads for _ in range(layers)]
    habits_at = {}
    for layer in range(layers):
        for head in range(heads):
            if (layer, head) in missing:
                continue
            habits = habits_of(layer / layers, rng)
            scores = scores_of(habits, rng)
            for name, score in scores.items():
                tables[name][layer][head] = round(score, 5)
                errors[name][layer][head] = round(abs(score) * 0.03 + 0.002, 5)
            roles[layer][head] = role_of(scores)
            found["details"][f"{stream}:{layer}:{head}"] = detail_of(habits, scores)
            habits_at[layer, head] = habits
    for question in found["questions"]:
        question["grid"][stream], question["sem"][stream] = tables[question["name"]], errors[question["name"]]
        table = tables[question["name"]]
        best = sorted(habits_at, key=lambda at: -table[at[0]][at[1]])[:4]
        for layer, head in best:
            found["sample"]["rows"][f"{stream}:{layer}:{head}"] = rows_of(habits_at[layer, head], rng)
    found["roles"][stream] = roles


def habits_of(depth, rng):
    """Shares of a head's attention: first token, previous token, induction, separators, near, anywhere."""
    weights = rng.dirichlet([0.5 + 1.6 * depth, 0.25, 0.1 + 0.15 * (0.3 < depth < 0.8), 0.25, 0.8 - 0.5 * depth, 0.6])
    return dict(zip(("first", "previous", "induction", "separator", "near", "any"), weights.tolist()))


def scores_of(h, rng):
    return {
        "sinks": h["first"],
        "entropy": 0.3 + 5.5 * h["any"] + 2 * h["near"] + 0.5 * h["separator"],
        "distance": 900 * h["first"] + 260 * h["any"] + 120 * h["induction"] + 4 * h["near"] + 1,
        "previous": h["previous"] + 0.1 * h["near"],
        "separator": h["separator"] + 0.1 * h["any"],
        "local": min(1.0, h["near"] + h["previous"] + 0.05),
        "induction_heads": h["induction"] * 0.95 + 0.01 * rng.random(),
        "copy_heads": float(np.clip(rng.normal(1.4 * h["induction"] - 0.1, 0.25), -1, 1)),
        "retrieval_heads": max(0.0, h["induction"] * 0.7 - 0.25),
    }


def role_of(scores):
    tests = [("previous token", "previous", 0.5), ("induction", "induction_heads", 0.4),
             ("retrieval", "retrieval_heads", 0.1), ("separator", "separator", 0.6), ("sink", "sinks", 0.3),
             ("local", "local", 0.8)]  # fmt: skip
    return next((role for role, name, least in tests if scores[name] >= least), "mixed")


def detail_of(h, scores):
    edges = [0, 1, *(2**k for k in range(1, 13))]
    mass = np.zeros(len(edges) - 1)
    mass[1] += h["previous"]
    mass[:5] += h["near"] * np.array([0.2, 0.3, 0.25, 0.15, 0.1])
    far = np.exp(-0.5 * ((np.arange(len(mass)) - 9) / 1.6) ** 2)
    mass += (h["first"] + h["any"] + h["induction"] + h["separator"]) * far / far.sum()
    names = ["first", "separators", "rest"]
    parts = [h["first"], h["separator"], 1 - h["first"] - h["separator"]]
    return {
        "distance": {"edges": edges, "mass": [round(float(x), 5) for x in mass]},
        "segments": {"names": names, "mass": [round(x, 5) for x in parts]},
        "entropy": round(scores["entropy"], 4),
    }


def rows_of(h, rng):
    rows = []
    for i, token in enumerate(TEXT):
        row = np.full(i + 1, h["any"] / (i + 1))
        row[0] += h["first"]
        row[max(0, i - 1)] += h["previous"]
        near = np.array([math.exp(-(i - j) / 2) for j in range(i + 1)])
        row += h["near"] * near / near.sum()
        after = [j + 1 for j in range(i) if TEXT[j].strip() == token.strip()]
        separators = [j for j in range(i + 1) if TEXT[j].strip() in {"", ",", ".", ";"}]
        for places, share in ((after, h["induction"]), (separators, h["separator"])):
            row[places or [0]] += share / max(1, len(places))
        row *= rng.uniform(0.85, 1.15, i + 1)
        row /= row.sum()
        best = np.argsort(-row, kind="stable")[:8]
        rows.append([[int(j), round(float(row[j]), 4)] for j in best if row[j] > 5e-4])
    return rows
