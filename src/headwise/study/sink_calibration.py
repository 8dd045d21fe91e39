"""Does a language model classify better when sinks behind the first token are shrunk in heads chosen for it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from headwise.errors import HeadwiseError
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.steer import ACT, Method, apply, option_logprobs
from headwise.study import tasks
from headwise.study.finding import Finding
from headwise.study.first_token_gain import interval
from headwise.study.induction import Heads, same_layers
from headwise.study.registry import study
from headwise.study.sinks import windows
from headwise.study.tasks import Example

SHOTS = 3
TASKS: dict[str, Callable[[int, int], list[Example]]] = {
    "sentiment": lambda seed, count: tasks.sentiment(seed, count, SHOTS),
    "topic": lambda seed, count: tasks.topic(seed, count, SHOTS),
}


@study(
    "act_accuracy",
    paper=Paper(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration",
        "2406.15765",
    ),
    room="steer",
    claim="Sinks behind the first token, shrunk in heads chosen on a few examples, make a model classify better.",
)
def act_accuracy(
    model: Any = "zoo:llm",
    seeds: Sequence[int] = (0, 1),
    calibration: int = 16,
    held_out: int = 24,
    draws: int = 2,
    method: ACT | None = None,
) -> Finding:
    """Two tasks with three shots. The heads are those whose strength has a slope that raises the right label's
    log-probability on the calibration examples: the paper's search, head by head, would take a hundred times as long.
    On other examples: accuracy and the right label's log-probability among the labels, for the chosen heads, as many
    random others of the same layers, and all heads. Beside it the loss of English prose."""
    opened = model if isinstance(model, Opened) else open_model(model)
    act = method or ACT()
    changes: dict[str, list[np.ndarray]] = {}
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for task, make in TASKS.items():
            examples = list({e.prompt: e for e in make(seed, calibration + held_out)}.values())
            tuned = act.calibrate(opened, examples[:calibration], by="gradient")
            chosen = list(tuned.heads or ())
            sets: dict[str, Heads] = {"chosen": chosen, "all": act.chosen(opened)}
            for draw in range(draws):
                sets[f"random_{draw}"] = drawn(opened, act, chosen, 10 * seed + draw)
            found = [answers(opened, act, example, sets) for example in examples[calibration:]]
            scores = {name: np.array([one[name] for one in found]) for name in ("plain", *sets)}
            for name, values in scores.items():
                changes.setdefault(name, []).append(values)
            rows.append(
                {
                    "task": task,
                    "seed": seed,
                    "heads": len(chosen),
                    "examples_with_sinks": np.mean([one["sinks"] > 0 for one in found]),
                    "heads_with_sinks": np.mean([one["sinks"] for one in found]),
                    "accuracy": {name: values[:, 0].mean() for name, values in scores.items()},
                    "log_probability": {name: values[:, 1].mean() for name, values in scores.items()},
                    "prose_loss_change": prose_change(opened, tuned),
                }
            )
    joined = {name: np.concatenate(values) for name, values in changes.items()}
    change = {name: interval(values - joined["plain"]) for name, values in joined.items() if name != "plain"}
    (accuracy, logp), (accuracy_low, low), (accuracy_high, high) = change["chosen"]
    random = [change[f"random_{draw}"][0][1] for draw in range(draws)]
    holds = bool(accuracy >= 0 and low > 0 and logp > max(random))
    return Finding(
        measured={
            "accuracy_plain": joined["plain"][:, 0].mean(),
            "change": {
                name: {"accuracy": [m[0], lo[0], hi[0]], "log_probability": [m[1], lo[1], hi[1]]}
                for name, (m, lo, hi) in change.items()
            },
            "tasks": rows,
            "examples": len(joined["plain"]),
        },
        expected="On held-out examples accuracy is not lower, the log-probability of the right label rises with 95% "
        "certainty, and more than with any draw of random heads.",
        verdict="holds" if holds else "fails",
        reason=(
            f"On {len(joined['plain'])} held-out examples accuracy goes from {joined['plain'][:, 0].mean():.1%} by "
            f"{accuracy:+.1%} ({accuracy_low:+.1%} to {accuracy_high:+.1%}), the right label's log-probability by "
            f"{logp:+.3f} nats ({low:+.3f} to {high:+.3f}), with random heads by "
            f"{', '.join(f'{x:+.3f}' for x in random)}, with all heads by {change['all'][0][1]:+.3f} (accuracy "
            f"{change['all'][0][0]:+.1%}); {np.mean([row['heads'] for row in rows]):.0f} heads are chosen; the loss of "
            f"prose changes by {np.mean([row['prose_loss_change'] for row in rows]):+.3f} nats."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def drawn(opened: Opened, act: ACT, chosen: Heads, seed: int) -> Heads:
    """As many random heads of each layer as there are chosen ones; where a layer has too few others, from any layer
    that may be changed."""
    found = same_layers(opened, chosen, chosen, seed)
    spare = [pair for pair in act.chosen(opened) if pair not in {*found, *chosen}]
    order = np.random.default_rng(seed).permutation(len(spare))
    return found + [spare[n] for n in order[: len(chosen) - len(found)]]


def answers(opened: Opened, act: ACT, example: Example, sets: dict[str, Heads]) -> dict[str, Any]:
    """For every set of heads: is the answer right, and the right label's log-probability among the labels. The sinks
    are looked for once, in all heads."""
    seen = act.prepare(opened, opened.encode(example.prompt)).sinks or ()
    found: dict[str, Any] = {"plain": scored(opened, example, None), "sinks": len(seen)}
    for name, heads in sets.items():
        mine = tuple(sink for sink in seen if sink[:2] in set(heads))
        found[name] = scored(opened, example, replace(act, sinks=mine)) if mine else found["plain"]
    return found


def scored(opened: Opened, example: Example, method: Method | None) -> tuple[float, float]:
    if example.gold is None:
        raise HeadwiseError("act_accuracy wants examples whose gold is known.")
    if method is None:
        p = option_logprobs(opened, example)
    else:
        with apply(opened, method):
            p = option_logprobs(opened, example)
    return float(int(p.argmax()) == example.gold), float(p.log_softmax(-1)[example.gold])


def prose_change(opened: Opened, act: ACT, texts: int = 3, length: int = 96) -> Float[np.ndarray, ""]:
    """The change of the mean loss a token of prose, the sinks of each window found first."""
    changes = []
    for ids in windows(opened, texts, length):
        batch = {"input_ids": ids[None].to(opened.device)}
        ready = act.prepare(opened, batch)
        with torch.no_grad():
            plain = opened.model(**batch, labels=batch["input_ids"]).loss
            with apply(opened, ready):
                changes.append(float(opened.model(**batch, labels=batch["input_ids"]).loss - plain))
    return np.mean(changes)
