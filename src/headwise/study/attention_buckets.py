"""Do several rotary bases together find a value wherever it stands?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention import attend
from headwise.models import Opened, open_model
from headwise.scan.needles import haystack
from headwise.steer import AttentionBuckets, choose_buckets
from headwise.steer.choose_buckets import CANDIDATES
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.tasks import Example, key_values

TRIED = (1.0, 1.4, 1.8, 2.3, 2.8)
"""Ratios whose perplexity says how far the base may be raised."""
HARM = 1.1
TOLERATED = 0.05
"""Nats by which the mean log-probability may fall."""


@study(
    "attention_buckets",
    paper=AttentionBuckets.paper,
    room="steer",
    claim="Copies of a model with complementary rotary bases, mixed by confidence, raise retrieval at the worst place.",
)
def attention_buckets(
    model: Any = "zoo:llm", seed: int = 0, items: int = 8, copies: int = 4, repeats: Sequence[int] = (1, 2, 2),
    length: int = 256,
) -> Finding:  # fmt: skip
    """The value of a key among 8 random pairs, the pair at each of 8 places as often: log-probability of the value's
    tokens, and whether all are the most probable. Bases: as far as each tried one alone keeps the perplexity of an
    English text within 1.1 times the model's; among those, `choose_buckets`. Plain, every other base alone (the best on
    the first `repeats`, the calibration split, judged on the others, made from other seeds), the copies with equal
    weights, AttentionBuckets with both ways to mix, and as placebo as many random bases of the same range. All from one
    forward pass of all bases. 95% bootstrap intervals over examples within places; perplexity of another piece of the
    text for the side effect."""
    opened = model if isinstance(model, Opened) else open_model(model)
    words = opened.tokenizer(haystack(), add_special_tokens=False, return_tensors="pt")["input_ids"]
    alone = perplexities(opened, words[:, :length], {str(r): AttentionBuckets((r,)) for r in TRIED}, TRIED)
    allowed = max(r for r in TRIED if alone[str(r)] <= HARM * alone["1.0"])
    candidates = [r for r in CANDIDATES if r <= max(allowed, 1 + 0.1 * copies)]
    chosen = choose_buckets(opened, copies, candidates, span=max(64, length))
    drawn = np.random.default_rng(seed).choice([r for r in candidates if r not in chosen], copies - 1, replace=False)
    ways, every = settings(chosen, (1.0, *map(float, drawn)))
    tables = []
    for number, each in enumerate(repeats):
        examples = key_values(seed * len(repeats) + number, items * each, items)
        tables.append(np.stack([answered(opened, example, ways, every) for example in examples]))
    singles = [n for n, name in enumerate(ways) if name.startswith("base")]
    best = list(ways)[max(singles, key=lambda n: tables[0][:, n, 0].mean())]
    held = np.concatenate(tables[1:])
    place = np.concatenate([np.arange(items * each) % items for each in repeats[1:]])
    side = perplexities(opened, words[:, -length:], ways, every)
    rows = [compared(name, held, list(ways), place, seed) | {"perplexity": side[name]} for name in ways]
    by = {row["setting"]: row for row in rows}
    plain, buckets, placebo = by["plain"], by["buckets"], by["random bases"]
    better = buckets["worst_change"][1] > 0 and buckets["mean_change"][0] > -TOLERATED
    holds = better and buckets["worst_change"][0] > placebo["worst_change"][0]
    told = {"random bases": placebo, "equal weights": by["equal weights"], "the best single base": by[best]}
    others = "; ".join(f"{name} {said(r['worst_change'])} and {said(r['mean_change'])}" for name, r in told.items())
    return Finding(
        measured={"settings": rows, "ratios": chosen, "random_ratios": drawn.tolist(), "best_single": best}
        | {"perplexity_alone": alone, "examples": len(held)},
        expected="At the worst place a higher log-probability than plain (interval above 0) and a larger rise than "
        f"with random bases; the mean falls by no more than {TOLERATED} nats.",
        verdict="holds" if holds else "fails",
        reason=f"Log-probability of the value at the worst of {items} places {said(buckets['worst_change'])}, mean "
        f"{said(buckets['mean_change'])}; {others}. Right: plain {plain['right']:.0%}, buckets {buckets['right']:.0%}; "
        f"perplexity {side['plain']:.2f} and {side['buckets']:.2f}.",
        model=opened.name,
        seeds=[seed],
    )


class Equal(AttentionBuckets):
    """The copies without their confidence."""

    def mixed(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        z = logits.float().unflatten(0, (-1, len(self.ratios)))
        return z.mean(1), torch.full_like(z[..., 0], 1 / len(self.ratios)).transpose(1, 2)


def settings(chosen: Sequence[float], drawn: Sequence[float]) -> tuple[dict[str, AttentionBuckets], tuple[float, ...]]:
    """What is compared, and all bases that takes."""
    ways = {"plain": AttentionBuckets((1.0,))}
    ways |= {f"base x {ratio:g}": AttentionBuckets((ratio,)) for ratio in chosen[1:]}
    ways |= {
        "buckets": AttentionBuckets(tuple(chosen)),
        "buckets, probs": AttentionBuckets(tuple(chosen), mix="probs"),
        "equal weights": Equal(tuple(chosen)),
        "random bases": AttentionBuckets(tuple(drawn)),
    }
    return ways, tuple(dict.fromkeys((*chosen, *drawn)))


def branches(opened: Opened, ids: Tensor, every: Sequence[float], places: slice) -> Float[Tensor, "base query word"]:
    """The logits of every base by itself, from one batch."""
    many = AttentionBuckets(tuple(every))
    with torch.no_grad(), attend(opened, edits=many.edits(opened)):
        return opened.model(**many.copies({"input_ids": ids}), use_cache=False).logits[:, places].float()


def logprobs(
    z: Float[Tensor, "base query word"], way: AttentionBuckets, every: Sequence[float]
) -> Float[Tensor, "query word"]:
    rows = [list(every).index(ratio) for ratio in way.ratios]
    return way.mixed(z[rows])[0][0].log_softmax(-1)


def answered(
    opened: Opened, example: Example, ways: Mapping[str, AttentionBuckets], every: Sequence[float]
) -> Float[np.ndarray, "setting 2"]:
    """Log-probability of the right answer, and whether each of its tokens is the most probable."""
    assert example.gold is not None
    prompt = opened.encode(example.prompt)["input_ids"][0]
    ids = opened.encode(example.prompt + example.options[example.gold])["input_ids"]
    short = min(len(prompt), ids.shape[1] - 1)
    start = int((ids[0, :short] == prompt[:short]).long().cumprod(0).sum())
    z = branches(opened, ids, every, slice(start - 1, -1))
    found = []
    for way in ways.values():
        p = logprobs(z, way, every)
        found.append([float(p.gather(-1, ids[0, start:, None]).sum()), float((p.argmax(-1) == ids[0, start:]).all())])
    return np.array(found)


def perplexities(
    opened: Opened, ids: Tensor, ways: Mapping[str, AttentionBuckets], every: Sequence[float]
) -> dict[str, float]:
    """e to the mean loss per token, for every setting."""
    ids = ids.to(opened.device)
    z = branches(opened, ids, every, slice(None, -1))
    losses = {name: -logprobs(z, way, every).gather(-1, ids[0, 1:, None]).mean() for name, way in ways.items()}
    return {name: float(loss.exp()) for name, loss in losses.items()}


def compared(
    name: str, held: Float[np.ndarray, "example setting 2"], names: list[str], place: np.ndarray, seed: int,
    draws: int = 2000,
) -> dict[str, Any]:  # fmt: skip
    """A setting beside plain: change of the mean and of the worst place, with 95% intervals."""
    rng = np.random.default_rng(seed)
    mine, plain = held[:, names.index(name), 0], held[:, names.index("plain"), 0]
    groups = [np.flatnonzero(place == p) for p in np.unique(place)]

    def changes(picked: Sequence[np.ndarray]) -> tuple[float, float]:
        means = np.array([[x[rows].mean() for rows in picked] for x in (mine, plain)])
        return float(np.diff(means[::-1].mean(1))[0]), float(np.diff(means[::-1].min(1))[0])

    drawn = [changes([rng.choice(rows, len(rows)) for rows in groups]) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    found = changes(groups)
    return {
        "setting": name,
        "logp": float(mine.mean()),
        "right": float(held[:, names.index(name), 1].mean()),
        "mean_change": [found[0], float(low[0]), float(high[0])],
        "worst_change": [found[1], float(low[1]), float(high[1])],
    }


def said(change: Sequence[float]) -> str:
    return f"{change[0]:+.3f} ({change[1]:+.3f} to {change[2]:+.3f})"
