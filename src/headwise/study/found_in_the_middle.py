"""Found in the middle: does a place itself draw attention, does relevance without it find the right document, and does
sharing out attention by that relevance help the answer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from headwise import steer
from headwise.models import Opened, Segments, open_model
from headwise.scan.needles import haystack
from headwise.steer.found_in_the_middle import attention_per_document
from headwise.study import tasks
from headwise.study.evaluate import difference, evaluate, interval, perplexity
from headwise.study.finding import Finding
from headwise.study.registry import study

PAPER = steer.FoundInTheMiddle.paper
ITEMS = 8
MIDDLE = range(2, 6)
NAMES = tuple(f"document {n + 1}" for n in range(ITEMS))
TEMPERATURES = (0.25, 1.0, 4.0)
"""Times the standard deviation of a prompt's relevances."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Attention per token to each document of a prompt, and to a dummy in its place."""

    example: tasks.Example
    own: Float[np.ndarray, " document"]
    dummy: Float[np.ndarray, " document"]

    @property
    def relevance(self) -> Float[np.ndarray, " document"]:
        return self.own - self.dummy


def middle(seed: int, count: int) -> list[tasks.Example]:
    """Prompts whose gold document stands neither among the first two nor among the last two."""
    return [e for e in tasks.documents(seed, 2 * count, ITEMS) if e.place in MIDDLE][:count]


def parts(example: tasks.Example) -> tuple[str, list[str], str]:
    """What stands before the documents, the documents, the question."""
    texts = {name: example.prompt[start:stop] for name, (start, stop) in example.spans.items()}
    before = example.prompt[: example.spans[NAMES[0]][0]].strip()
    return before, [texts[name] for name in NAMES], texts["question"]


def look(opened: Opened, examples: Sequence[tasks.Example]) -> list[Seen]:
    """One pass a prompt and one a document; studies run one after the other share them."""
    for example in examples:
        key = (opened.fingerprint, example.prompt)
        if key not in _SEEN:
            own, dummy = (
                f(opened, *parts(example)).mean((0, 1)).numpy() for f in (attention_per_document, steer.place_attention)
            )
            _SEEN[key] = Seen(example, own, dummy)
    return [_SEEN[opened.fingerprint, example.prompt] for example in examples]


_SEEN: dict[tuple[str, str], Seen] = {}


@study(
    "position_bias",
    paper=PAPER,
    room="steer",
    claim="A document gets more attention at the beginning and the end of a list than in its middle, whatever it says.",
)
def position_bias(model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), count: int = 6) -> Finding:
    """The attention per token of a prompt's last token to a dummy at each of 8 places, mean over all layers and heads,
    among documents that are others in every prompt. Index: mean of the two ends over the mean of the middle four."""
    opened = model if isinstance(model, Opened) else open_model(model)
    sets = [np.array([s.dummy for s in look(opened, middle(seed, count))]) for seed in seeds]
    curves = np.concatenate(sets)
    rng = np.random.default_rng(0)
    drawn = curves[rng.integers(len(curves), size=(1000, len(curves)))].mean(1)
    low, high = np.quantile([u_index(curve) for curve in drawn], [0.025, 0.975])
    inside = curves[:, list(MIDDLE)].mean(1)
    ends = {name: interval(curves[:, at] / inside) for name, at in (("first", 0), ("last", -1))}
    found = u_index(curves.mean(0))
    holds = low > 1 and all(end.low > 1 for end in ends.values())
    return Finding(
        measured={
            "curve": curves.mean(0),
            "u_index": found,
            "interval": [low, high],
            "first_over_middle": ends["first"],
            "last_over_middle": ends["last"],
            "u_index_places_shuffled": u_index(rng.permuted(curves, axis=1).mean(0)),
            "correlation_of_the_seeds": float(np.corrcoef([s.mean(0) for s in sets])[0, 1:].min()),
            "prompts": len(curves),
        },
        expected="With 95% certainty both ends get more than the middle, and the index is above 1.",
        verdict="holds" if holds else "fails",
        reason=(
            f"A dummy gets {ends['first'].mean:.2f} times the middle's attention in the first place and "
            f"{ends['last'].mean:.2f} times in the last; index {found:.2f} ({low:.2f} to {high:.2f})."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def u_index(curve: Float[np.ndarray, " document"]) -> float:
    """Mean of the ends over the mean of the middle."""
    return float(curve[[0, -1]].mean() / curve[list(MIDDLE)].mean())


@study(
    "calibrated_relevance",
    paper=PAPER,
    room="steer",
    claim="Less what its place draws, attention finds the relevant document in the middle of a list more often.",
)
def calibrated_relevance(model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), count: int = 6) -> Finding:
    """Recall of the gold document among the three of most attention, plain and calibrated, with the gold in the middle
    four of 8 places. Control: the terms of the places given to other places."""
    opened = model if isinstance(model, Opened) else open_model(model)
    seen = [s for seed in seeds for s in look(opened, middle(seed, count))]
    rng = np.random.default_rng(0)
    ways = {
        "plain": [s.own for s in seen],
        "calibrated": [s.relevance for s in seen],
        "shuffled": [s.own - rng.permutation(s.dummy) for s in seen],
    }
    hits = {
        name: np.array([rank(row, s.example.place) < 3 for row, s in zip(rows, seen, strict=True)], float)
        for name, rows in ways.items()
    }
    rise = interval(hits["calibrated"] - hits["plain"])
    beyond = interval(hits["calibrated"] - hits["shuffled"])
    return Finding(
        measured={
            "recall": {name: hit.mean() for name, hit in hits.items()},
            "rank_of_gold": {
                name: np.mean([rank(row, s.example.place) for row, s in zip(rows, seen, strict=True)])
                for name, rows in ways.items()
            },
            "rise": rise,
            "rise_over_shuffled": beyond,
            "prompts": len(seen),
            "chance": 3 / ITEMS,
        },
        expected="Recall at 3 rises with 95% certainty, also above that with the places' terms shuffled.",
        verdict="holds" if rise.low > 0 and beyond.low > 0 else "fails",
        reason=(
            f"Recall at 3 of {ITEMS} documents is {hits['plain'].mean():.2f} by attention and "
            f"{hits['calibrated'].mean():.2f} calibrated (change {rise.mean:+.2f}, {rise.low:+.2f} to "
            f"{rise.high:+.2f}), {hits['shuffled'].mean():.2f} with shuffled terms."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def rank(scores: Float[np.ndarray, " document"], gold: int | None) -> int:
    """How many documents are above the gold one."""
    return int((scores > scores[gold]).sum())


@study(
    "found_in_the_middle",
    paper=PAPER,
    room="steer",
    claim="Attention shared out over documents by calibrated relevance makes answers from the middle more probable.",
)
def found_in_the_middle(
    model: Any = "zoo:llm", seeds: Sequence[int] = (0, 1, 2), count: int = 6, calibration: int = 6
) -> Finding:
    """Log-probability of the right answer with the gold document in the middle four of 8 places. The temperature is
    chosen on other prompts. Placebo: the same relevances given to random documents. Beside it: all attention to the
    gold document, and the loss of ordinary text behind 8 pieces of text that are treated as documents."""
    opened = model if isinstance(model, Opened) else open_model(model)
    chosen = look(opened, middle(100, calibration))
    settings = {str(t): steered({s.example.prompt: s.relevance for s in chosen}, t) for t in TEMPERATURES}
    table = evaluate(opened, [s.example for s in chosen], settings)
    tried = {t: difference(table, str(t)).mean for t in TEMPERATURES}
    best = max(TEMPERATURES, key=lambda t: tried[t])
    seen = [s for seed in seeds for s in look(opened, middle(seed, count))]
    rng = np.random.default_rng(0)
    settings = {
        "calibrated": steered({s.example.prompt: s.relevance for s in seen}, best),
        "placebo": steered({s.example.prompt: rng.permutation(s.relevance) for s in seen}, best),
        "oracle": steered({s.example.prompt: np.eye(ITEMS)[s.example.place] for s in seen}, 0.25),
    }
    table = evaluate(opened, [s.example for s in seen], settings)
    rise, beyond = difference(table, "calibrated"), difference(table, "calibrated", against="placebo")
    shares = [settings["calibrated"](s.example)[0].shares[s.example.place] for s in seen]
    means = table.groupby("setting")[["logp", "right"]].mean()
    return Finding(
        measured={
            "logp": means["logp"].to_dict(),
            "accuracy": means["right"].to_dict(),
            "rise": rise,
            "rise_over_placebo": beyond,
            "rise_oracle": difference(table, "oracle"),
            "temperature": best,
            "rise_on_calibration_prompts": tried,
            "share_of_gold": {
                "plain": np.mean([s.own[s.example.place] / s.own.sum() for s in seen]),
                "calibrated": float(np.mean(shares)),
            },
            "perplexity": {
                "plain": after_documents(opened),
                "calibrated": after_documents(opened, seen[0].relevance, best),
            },
            "prompts": len(seen),
        },
        expected="The right answer's log-probability rises with 95% certainty, also above the placebo's.",
        verdict="holds" if rise.low > 0 and beyond.low > 0 else "fails",
        reason=(
            f"The log-probability changes by {rise.mean:+.2f} nats ({rise.low:+.2f} to {rise.high:+.2f}), against the "
            f"placebo by {beyond.mean:+.2f} ({beyond.low:+.2f} to {beyond.high:+.2f}); with all attention on the gold "
            f"document by {difference(table, 'oracle').mean:+.2f}."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def steered(relevances: Mapping[str, Float[np.ndarray, " document"]], times: float) -> Any:
    """The method for an example, with a temperature of so many standard deviations of its relevances."""

    def methods(example: tasks.Example) -> list[steer.Method]:
        return [method(relevances[example.prompt], times)]

    return methods


def method(relevance: Float[np.ndarray, " document"], times: float) -> steer.FoundInTheMiddle:
    given = tuple(float(r) for r in relevance)
    return steer.FoundInTheMiddle(NAMES, given, temperature=times * float(np.std(relevance)))


def after_documents(
    opened: Opened, relevance: Float[np.ndarray, " document"] | None = None, times: float = 1.0, each: int = 16
) -> float:
    """Perplexity of 32 tokens of a novel, behind 8 pieces of it that have the relevances of documents."""
    stop = each * ITEMS
    spans = {name: (n * each, (n + 1) * each - (n == ITEMS - 1)) for n, name in enumerate(NAMES)}
    segments = Segments.from_spans(spans | {"last": (stop - 1, stop), "generated": (stop, stop + 32)}, stop + 32)
    methods = [] if relevance is None else [method(relevance, times)]
    return perplexity(opened, haystack(), methods, stop + 32, windows=6, segments=segments, start=stop)
