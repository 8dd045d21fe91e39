"""Do heads keep their roles from text to text, and do roles stand in the order in which a survey puts them?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch

from headwise import scan
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.vocabulary import FUNCTIONS, HEADS, STAGES
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.sinks import windows

ASKED = ("sinks", "positional_heads", "text_roles")
SHUFFLES = 200
BEST = 5
STAGED = ("positional_heads", "induction_heads", "copy_heads", "retrieval_heads", "text_roles", "name_movers",
          "option_heads", "negative_heads", "relation_heads", "maps_relations")  # fmt: skip


@study(
    "roles_stable",
    paper=Paper("A Multiscale Visualization of Attention in the Transformer Model", "1906.05714"),
    room="scan",
    claim="Heads have roles of their own, such as looking one back or at delimiters: they keep them on other texts.",
)
def roles_stable(
    models: Sequence[Any] = ("zoo:llm", "zoo:encoder"), texts: int = 6, length: int = 256, seed: int = 0
) -> Finding:
    """A role is found for every head on each of several windows of prose, apart; kappa is the agreement of two windows
    beyond what the shares of the roles alone give, averaged over pairs of windows. Control: the roles of one window
    shuffled among the heads of a layer, 200 times. Rule: in every model kappa is at least 0.6 and above all but 5% of
    the shuffled ones, and some head gives the token before more than half of its attention on every window."""
    rng = np.random.default_rng(seed)
    measured: dict[str, Any] = {}
    holds = True
    for given in models:
        opened = given if isinstance(given, Opened) else open_model(given)
        ids = windows(opened, texts, length).to(opened.device)
        found = [scan.heads(opened, inputs=[{"input_ids": row[None]}], questions=ASKED).heads for row in ids]
        roles = [table["role"].to_numpy() for table in found]
        layers = found[0]["layer"].to_numpy()
        agreed = np.mean([kappa(a, b) for a, b in combinations(roles, 2)])
        shuffled = [kappa(roles[0], among_layers(roles[1], layers, rng)) for _ in range(SHUFFLES)]
        previous = float(np.min([table["previous"] for table in found], axis=0).max())
        bound = float(np.quantile(shuffled, 0.95))
        holds &= bool(agreed >= 0.6 and agreed > bound and previous > 0.5)
        measured[opened.name] = {
            "kappa": agreed,
            "same_role": np.mean([(a == b).mean() for a, b in combinations(roles, 2)]),
            "shuffled_kappa_95": bound,
            "previous_token_head": previous,
            "roles": pd.Series(roles[0]).value_counts().to_dict(),
        }
    told = "; ".join(
        f"{name}: kappa {m['kappa']:.2f} (shuffled within layers at most {m['shuffled_kappa_95']:.2f}), best "
        f"previous-token head {m['previous_token_head']:.2f} on its worst window"
        for name, m in measured.items()
    )
    return Finding(
        measured=measured,
        expected="Kappa of at least 0.6, above 95% of the shuffled ones; a previous-token head above 0.5 everywhere.",
        verdict="holds" if holds else "fails",
        reason=f"{told}.",
        model=", ".join(measured),
        seeds=[seed],
    )


def kappa(one: np.ndarray, other: np.ndarray) -> float:
    """Cohen's kappa: (agreement - chance) / (1 - chance), chance by the shares of the labels; 1 for equal labels."""
    labels = np.union1d(one, other)
    chance = float(sum((one == label).mean() * (other == label).mean() for label in labels))
    return 1.0 if chance == 1 else float(((one == other).mean() - chance) / (1 - chance))


def among_layers(roles: np.ndarray, layers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The roles of every layer shuffled among its heads."""
    return roles[np.lexsort((rng.random(len(roles)), layers))] if len(roles) else roles


@study(
    "stages_by_depth",
    paper=HEADS,
    room="scan",
    claim="Heads stand in the order of thought: identification in the context first, reasoning deeper.",
)
def stages_by_depth(model: Any = "zoo:llm", length: int = 512, questions: Sequence[str] = STAGED) -> Finding:
    """Depth of a function: the mean layer of its five highest heads, as a share of all layers. Functions that have a
    column of their own are taken, each column once. Rule (direction only, as the survey says no more): the mean depth
    of in-context identification is below that of latent reasoning, and previous-token heads are less deep than
    induction heads. Beside: the share of random assignments of stages to functions that part the two as much.
    Expression preparation has no column of its own here, so that the survey's last stage is not tested."""
    opened = model if isinstance(model, Opened) else open_model(model)
    ids = windows(opened, 1, length).to(opened.device)
    found = scan.heads(opened, inputs=[{"input_ids": ids}], questions=list(questions))
    depths = depth_of_functions(found)
    by_stage = {stage: [depth for s, depth in depths.values() if s == stage] for stage in STAGES}
    mean = {stage: float(np.mean(some)) if some else None for stage, some in by_stage.items()}
    gap = mean["LR"] - mean["ICI"]
    both = np.array(by_stage["LR"] + by_stage["ICI"])
    drawn = np.array([np.random.default_rng(n).permutation(both) for n in range(2000)])
    cut = len(by_stage["LR"])
    chance = float((drawn[:, :cut].mean(1) - drawn[:, cut:].mean(1) >= gap).mean())
    previous, induction = depths["previous token"][1], depths["induction"][1]
    holds = gap > 0 and previous < induction
    return Finding(
        measured={
            "depth": {name: depth for name, (_, depth) in depths.items()},
            "mean_depth": mean,
            "functions": {stage: len(some) for stage, some in by_stage.items()},
            "chance": chance,
        },
        expected="Mean depth of identification below that of reasoning; previous-token before induction heads.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Identification at {mean['ICI']:.2f} of the depth ({len(by_stage['ICI'])} functions), reasoning at "
            f"{mean['LR']:.2f} ({cut}); so far apart by chance in {chance:.0%} of random assignments. Previous-token "
            f"heads at {previous:.2f}, induction heads at {induction:.2f}."
        ),
        model=opened.name,
        seeds=[0],
    )


def depth_of_functions(found: scan.Scan) -> dict[str, tuple[str, float]]:
    """Stage and depth of every function that has a column of its own in the scan; of two with one column the first."""
    layers = int(found.heads["layer"].max())
    depths: dict[str, tuple[str, float]] = {}
    seen: set[str] = set()
    for function in FUNCTIONS:
        if function.measured and function.column in found.heads and function.column not in seen:
            seen.add(function.column)
            best = found.top(function.column, BEST)
            depths[function.name] = (function.stage, float(best["layer"].mean() / max(layers, 1)))
    return depths


@study(
    "name_movers_matter",
    paper=HEADS,
    room="scan",
    claim="Silencing the heads of a function hurts the task it is for more than silencing random heads.",
)
def name_movers_matter(
    model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), prompts: int = 32, silenced: int = 10
) -> Finding:
    """Name movers (the ten highest) are found on one set of "Mary and John" sentences and silenced on another. Measured
    is the log-probability of the receiver's name minus that of the giver's; control: as many random heads of the same
    layers, three draws. Rule: on every seed the loss is above 0 and more than 3 times the mean loss of the control."""
    from headwise.scan import quiz
    from headwise.study.induction import same_layers

    opened = model if isinstance(model, Opened) else open_model(model)
    rows = []
    for seed in seeds:
        scored = scan.heads(opened, questions=[scan.NameMovers(first_seed=100 + seed)])
        movers = scored.pattern("name_movers").pairs(silenced)
        held_out = quiz.gifts(opened, prompts, 1000 + seed)
        clean = preference(opened, held_out)
        draws = [same_layers(opened, movers, movers, 10 * seed + n) for n in range(3)]
        rows.append(
            {
                "seed": seed,
                "preference": clean.mean(),
                "right": (clean > 0).mean(),
                "loss": clean.mean() - preference(opened, held_out, movers).mean(),
                "loss_random": clean.mean() - np.mean([preference(opened, held_out, heads).mean() for heads in draws]),
            }
        )
    holds = all(row["loss"] > 0 and row["loss"] > 3 * max(row["loss_random"], 0.0) for row in rows)
    mean = pd.DataFrame(rows).mean()
    return Finding(
        measured={"seeds": rows, "loss": mean["loss"], "loss_random": mean["loss_random"], "right": mean["right"]},
        expected="On every seed the preference for the right name falls, by more than 3 times that of random heads.",
        verdict="holds" if holds else "fails",
        reason=(
            f"The right name is preferred in {mean['right']:.0%} of sentences, by {mean['preference']:.2f} nats; "
            f"silencing the {silenced} highest name movers takes {mean['loss']:.2f} of it, random heads of the same "
            f"layers {mean['loss_random']:.2f}."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


@torch.no_grad()
def preference(opened: Opened, prompts: Sequence[scan.Prompt], silenced: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """log p(receiver) - log p(giver) as the next word (by the first token of each), a prompt."""
    from headwise.attention import HeadGain, attend

    edits = [HeadGain(heads=list(silenced), gain=0.0)] if silenced else []
    found = []
    with attend(opened, edits=edits):
        for prompt in prompts:
            logits = opened.model(**prompt.inputs, use_cache=False).logits[0, -1].float()
            first = [first_token(opened, prompt.own[who]) for who in ("receiver", "giver")]
            found.append(float(logits[first[0]] - logits[first[1]]))
    return np.array(found)


def first_token(opened: Opened, name: str) -> int:
    """The token with which the name begins after a space."""
    with_space, without = (
        opened.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"to {name}", "to")
    )
    return int(with_space[len(without)])
