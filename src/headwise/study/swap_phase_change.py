"""Which small models form induction heads, and does in-context learning come with them?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise import swap
from headwise.attention import Map, attend
from headwise.study.finding import Finding
from headwise.study.hosts import HostOutput
from headwise.study.registry import study
from headwise.study.train import Draw, Recipe, build, train

PERIODS = (8, 24)
EARLY, LATE = (4, 8), (48, 64)
"""Places whose losses are compared: the first lie before any repetition."""


@study(
    "smeared_key_phase_change",
    paper=swap.SmearedKey.paper,
    room="swap",
    claim="One layer forms no induction heads, two do, and one does with smeared keys; in-context learning comes then.",
)
def smeared_key_phase_change(
    seeds: Sequence[int] = (0, 1, 2), steps: int = 600, every: int = 20, dim: int = 64, heads: int = 4,
    vocabulary: int = 64,
) -> Finding:  # fmt: skip
    """Models of attention alone with rotary positions, on 64 tokens: 8 to 24 random ones, all different, repeated. The
    period differs from sequence to sequence, so that no fixed distance helps. Every 20 steps, on held-out sequences:
    the best head's prefix matching, and the in-context-learning score, the loss at places 48 to 64 minus that at 4 to
    8. When a measure came: the first checkpoint past half of its way. The paper's models read text."""
    draw = repeats(vocabulary)
    held = draw(torch.Generator().manual_seed(10_000))
    position = swap.Rope()
    kinds: dict[str, tuple[int, Callable[[], nn.Module]]] = {
        "one layer": (1, lambda: swap.Attention(dim, heads, causal=True, position=position)),
        "two layers": (2, lambda: swap.Attention(dim, heads, causal=True, position=position)),
        "one layer, smeared": (1, lambda: swap.SmearedKey(dim, heads, causal=True, smear=0.0, position=position)),
    }
    keep = range(0, steps + 1, every)
    runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in kinds}
    for name, (layers, make) in kinds.items():
        for seed in seeds:
            model = build(lambda make=make, n=layers: AttentionOnly(make, vocabulary, dim, n), seed)  # type: ignore[misc]
            recipe = Recipe(steps, 3e-3, warmup=min(100, steps // 10), seed=seed)
            seen = [measured(m, held) for _, m in train(model, draw, recipe, keep).each()]
            runs[name].append({"prefix": [p for p, _ in seen], "icl": [i for _, i in seen]})
    prefix, icl = ({name: [run[what][-1] for run in rs] for name, rs in runs.items()} for what in ("prefix", "icl"))
    formed = ("two layers", "one layer, smeared")
    came = {name: [(arrival(run["prefix"]), arrival(run["icl"])) for run in runs[name]] for name in formed}
    apart = max(abs(p - i) * every for pairs in came.values() for p, i in pairs) / steps
    holds = (
        max(prefix["one layer"]) < 0.3
        and min(min(prefix[name]) for name in formed) > 0.5
        and max(max(icl[name]) for name in formed) < min(icl["one layer"]) - 1
        and apart <= 0.1
    )
    steps_to = {name: float(np.mean([p for p, _ in pairs])) * every for name, pairs in came.items()}
    return Finding(
        measured={
            "prefix_matching": prefix,
            "icl_score": icl,
            "runs": runs,
            "every": every,
            "step_of_prefix_and_icl": {n: [[p * every, i * every] for p, i in pairs] for n, pairs in came.items()},
        },
        expected=(
            "On every seed the best head's prefix matching ends below 0.3 with one layer and above 0.5 with two or "
            "with smeared keys, whose in-context-learning score is lower by more than 1 nat; both measures come within "
            "10% of the training of each other."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Prefix matching of the best head {np.mean(prefix['one layer']):.2f} with one layer, "
            f"{np.mean(prefix['two layers']):.2f} with two (from step {steps_to['two layers']:.0f}), "
            f"{np.mean(prefix['one layer, smeared']):.2f} with one and smeared keys (from step "
            f"{steps_to['one layer, smeared']:.0f}); in-context-learning scores {np.mean(icl['one layer']):.2f}, "
            f"{np.mean(icl['two layers']):.2f}, {np.mean(icl['one layer, smeared']):.2f} nats; prefix matching and "
            f"score come at most {apart:.0%} of the training apart."
        ),
        model=f"attention-only models of width {dim}, trained for {steps} steps",
        seeds=list(seeds),
    )


class AttentionOnly(nn.Module):
    """`x + attention(norm(x))` in every layer, and nothing else."""

    def __init__(self, make: Callable[[], nn.Module], vocabulary: int, dim: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(make() for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(layers + 1))
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(
        self, input_ids: Int[Tensor, "batch token"], labels: Int[Tensor, "batch token"] | None = None
    ) -> HostOutput:
        x = self.embed(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        logits = self.head(self.norms[-1](x))
        if labels is None:
            return HostOutput(logits)
        nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return HostOutput(logits, nll, nll)


def repeats(vocabulary: int, rows: int = 32, length: int = LATE[1]) -> Draw:
    """Sequences that repeat their first 8 to 24 tokens."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        period = torch.randint(PERIODS[0], PERIODS[1] + 1, (rows, 1), generator=generator)
        tokens = torch.rand(rows, vocabulary, generator=generator).argsort(1)
        ids = tokens.gather(1, torch.arange(length) % period)
        return {"input_ids": ids, "labels": ids}

    return draw


@torch.no_grad()
def measured(model: nn.Module, held: Mapping[str, Tensor]) -> tuple[float, float]:
    """The best head's prefix matching, and the in-context-learning score."""
    ids = held["input_ids"]
    with attend(model, [Map()]) as run:
        logits = model(ids).logits
    maps = run.tree["text"].dataset["map"].transpose("layer", "head", "sample", "query", "key").values
    best = prefix_matching(torch.tensor(maps), ids).max().item()
    loss = nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(0)
    early, late = (loss[start - 1 : stop - 1].mean().item() for start, stop in (EARLY, LATE))
    return best, late - early


def prefix_matching(
    maps: Float[Tensor, "layer head sample query key"], ids: Int[Tensor, "sample token"]
) -> Float[Tensor, "layer head"]:
    """The mean weight, over queries whose token was there before, of the places after its earlier copies."""
    same = (ids[:, :, None] == ids[:, None]).tril(-1)
    after = same.roll(1, 2)
    asked = same.any(-1)
    weight = (maps * after).sum(-1)
    return (weight * asked).sum((-1, -2)) / asked.sum()


def arrival(values: Sequence[float]) -> int:
    """The first of them past half of the way from the first to the last."""
    half = (values[0] + values[-1]) / 2
    past = [(value - half) * np.sign(values[-1] - values[0]) >= 0 for value in values]
    return past.index(True)
