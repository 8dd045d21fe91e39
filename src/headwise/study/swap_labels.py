"""Label attention as the last layer of a tagger: is it as right, and does each label have a head of its own?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from headwise import scan, swap
from headwise.study.finding import Finding
from headwise.study.hosts import Block, HostOutput, matched
from headwise.study.registry import study
from headwise.study.swap_train import count
from headwise.study.train import Recipe, build, train

PAPER = swap.LabelAttention.paper
DIM, LABELS = 64, 8
Kind = Literal["ordinary", "vector", "token", "vector, ffn"]


@dataclass(frozen=True)
class Phrases:
    """Sentences of `length` words in phrases, a new one begun at a word in 2.5. The first word of a phrase says which
    of 8 kinds it is (two words for each kind), the others are of 24 words that all kinds share. Asked of every word is
    the kind of its phrase; and a word that ends the sentence (one of two) turns all kinds around, k to 7 - k."""

    length: int = 14
    shared: int = 24
    rows: int = 64

    @property
    def vocabulary(self) -> int:
        return 2 * LABELS + self.shared + 2

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        shape = (self.rows, self.length)
        starts = torch.rand(shape, generator=generator) < 0.4
        starts[:, 0] = True
        kind = torch.randint(LABELS, shape, generator=generator)
        which = torch.where(starts, torch.arange(self.length), 0).cummax(1).values
        kind = kind.gather(1, which)
        head = 2 * kind + torch.randint(2, shape, generator=generator)
        other = 2 * LABELS + torch.randint(self.shared, shape, generator=generator)
        turned = torch.rand(self.rows, 1, generator=generator) < 0.5
        last = self.vocabulary - 2 + turned.long()
        words = torch.cat([torch.where(starts, head, other), last], 1)
        label = torch.where(turned, LABELS - 1 - kind, kind)
        return {"input_ids": words, "labels": torch.cat([label, torch.full_like(last, -100)], 1)}


class Tagger(nn.Module):
    """One block of ordinary attention, then the last layer: another block, or label attention; and a linear reading."""

    def __init__(self, kind: Kind, task: Phrases, hidden: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(task.vocabulary, DIM), nn.Embedding(task.length + 1, DIM)
        self.first, self.norm = Block(swap.Attention(DIM, 4), DIM, hidden), nn.RMSNorm(DIM)
        self.last: nn.Module = (
            nn.Sequential(Block(swap.Attention(DIM, 4), DIM, 2 * DIM), nn.RMSNorm(DIM))
            if kind == "ordinary"
            else swap.LabelAttention(
                DIM,
                LABELS,
                head_dim=16,
                proj_dim=16,
                query="token" if kind == "token" else "vector",
                ffn=2 * DIM if kind == "vector, ffn" else 0,
            )
        )
        self.head = nn.Linear(DIM if kind == "ordinary" else LABELS * 16, LABELS)

    def features(self, input_ids: Tensor) -> Tensor:
        x = self.first(self.embed(input_ids) + self.place.weight[: input_ids.shape[1]])
        return self.last(x if isinstance(self.last, nn.Sequential) else self.norm(x))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> HostOutput:
        logits = self.head(self.features(input_ids))
        if labels is None:
            return HostOutput(logits)
        nll = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)
        return HostOutput(logits, nll, nll)


def tagger(kind: Kind, task: Phrases, seed: int, steps: int) -> nn.Module:
    """Trained; all kinds with as many parameters as the ordinary one, through the first block's feed-forward part."""
    full = count(Tagger("ordinary", task, 4 * DIM))
    model = build(partial(matched, partial(Tagger, kind, task), full, 4 * DIM), seed)
    return train(model, task, Recipe(steps, 3e-3, warmup=steps // 10, decay="cosine", seed=seed)).model


def asked(task: Phrases, seed: int) -> dict[str, Tensor]:
    """1,024 sentences held out."""
    drawn = [task(torch.Generator().manual_seed(50_000 + 100 * seed + n)) for n in range(1024 // task.rows)]
    return {name: torch.cat([batch[name] for batch in drawn]) for name in drawn[0]}


@study(
    "label_attention_tags",
    paper=PAPER,
    room="swap",
    claim="Label attention as the last layer of a tagger is as right as self-attention, with one map row a label.",
)
def label_attention_tags(seeds: Sequence[int] = (0, 1, 2), steps: int = 500) -> Finding:
    """Words of made-up sentences are tagged with the kind of their phrase, which its first word says and a word at the
    end turns around. Two layers of width 64; the last one is self-attention of 4 heads with a feed-forward part, or
    label attention of 8 heads with one query each, or with a query a token. Held-out sentences. Reported beside it: one
    query each and a feed-forward layer behind, as in the authors' best parser, which mixes the labels' parts."""
    task, kinds = Phrases(), get_args(Kind)
    right: dict[str, list[float]] = {kind: [] for kind in kinds}
    for seed in seeds:
        batch = asked(task, seed)
        for kind in kinds:
            with torch.no_grad():
                hits = tagger(kind, task, seed, steps)(batch["input_ids"]).logits.argmax(-1) == batch["labels"]
            right[kind].append(float(hits[batch["labels"] >= 0].float().mean()))
    mean = {kind: float(np.mean(values)) for kind, values in right.items()}
    n = task.length + 1
    cost = {
        query: swap.LabelAttention(DIM, LABELS, head_dim=16, proj_dim=16, query=query).flops(n)  # type: ignore[arg-type]
        for query in ("vector", "token")
    }
    holds = mean["vector"] >= mean["ordinary"] - 0.01 and mean["vector"] >= mean["token"] - 0.01
    return Finding(
        measured={
            "accuracy": right,
            "mean": mean,
            "weights_of_the_last_layer": {"ordinary": 4 * n * n, "vector": LABELS * n, "token": LABELS * n * n},
            "flops_of_the_last_layer": cost,
            "parameters": count(Tagger("ordinary", task, 4 * DIM)),
            "chance": 1 / LABELS,
        },
        expected="With one query a label at most 1 point below self-attention and below a query a token (means).",
        verdict="holds" if holds else "fails",
        reason=(
            f"Right: self-attention {mean['ordinary']:.1%}, label attention {mean['vector']:.1%} with a query a label "
            f"and {mean['token']:.1%} with a query a token (the former at {cost['vector'] / cost['token']:.2f} of the "
            f"latter's operations); a query a label with a feed-forward layer behind {mean['vector, ffn']:.1%}. What a "
            "label found in the sentence is the same for all words, and meets a word's own only as a sum."
        ),
        model=f"two-layer taggers of width {DIM}, trained for {steps} steps",
        seeds=list(seeds),
    )


@study(
    "label_head_roles",
    paper=PAPER,
    room="swap",
    claim="Each label has a dominant head, and without that head this label suffers most.",
)
def label_head_roles(seeds: Sequence[int] = (0, 1, 2), steps: int = 500) -> Finding:
    """The same taggers with a query a label. A word's dominant head adds most to the logit of the label that was
    predicted (exact for a linear reading). Dominance: of the words of a label the share with its most frequent head,
    mean over labels; the control has the predicted labels shuffled. Then the part of each label's head is set to its
    mean over words, and the accuracy that is lost on this label compared with the mean loss on the others. The authors'
    heuristic (sums of features) is reported beside it."""
    rows = []
    for seed in seeds:
        task, batch = Phrases(), asked(Phrases(), seed)
        model = tagger("vector", task, seed, steps)
        keep = batch["labels"] >= 0
        with torch.no_grad():
            y, wanted = model.features(batch["input_ids"])[keep], batch["labels"][keep]
            predicted = model.head(y).argmax(-1)
            shares = scan.label_contribution(y, LABELS, model.head.weight)
            exact = shares[torch.arange(len(y)), predicted].argmax(-1)
            heuristic = scan.label_contribution(y, LABELS).argmax(-1)
            mixed = predicted[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
            rows.append(
                {
                    "dominance": dominance(exact, predicted),
                    "shuffled": dominance(exact, mixed),
                    "heuristic": dominance(heuristic, predicted),
                    "heuristic_shuffled": dominance(heuristic, mixed),
                    "accuracy": float((predicted == wanted).float().mean()),
                    "hit_most": hit_most(model, y, wanted, exact, predicted),
                }
            )
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    clear = all(row["dominance"] - row["shuffled"] >= 0.2 for row in rows)
    return Finding(
        measured={"by_seed": rows, "mean": mean, "chance": 1 / LABELS},
        expected=(
            "On every seed dominance is at least 0.2 above that with shuffled labels; and at least three quarters of "
            "the labels lose more than the others do on average when their own head is ablated (mean over seeds)."
        ),
        verdict="holds" if clear and mean["hit_most"] >= 0.75 else "fails",
        reason=(
            f"Dominance {mean['dominance']:.2f}, {mean['shuffled']:.2f} with labels shuffled (by sums of features "
            f"{mean['heuristic']:.2f} and {mean['heuristic_shuffled']:.2f}); {mean['hit_most']:.0%} of the labels lose "
            f"more than the others without their head; {mean['accuracy']:.1%} of the words are tagged right."
        ),
        model=f"two-layer taggers of width {DIM}, trained for {steps} steps",
        seeds=list(seeds),
    )


def frequent(head: Tensor, label: Tensor) -> Tensor:
    """How often each head is dominant for each label [label, head]."""
    return torch.bincount(label * LABELS + head, minlength=LABELS**2).view(LABELS, LABELS).double()


def dominance(head: Tensor, label: Tensor) -> float:
    table = frequent(head, label)
    there = table.sum(1) > 0
    return float((table.amax(1) / table.sum(1).clamp(min=1))[there].mean())


def hit_most(model: nn.Module, y: Tensor, wanted: Tensor, head: Tensor, predicted: Tensor) -> float:
    """The share of labels that lose more accuracy than the others on average when their head's part is its mean."""
    own = frequent(head, predicted).argmax(1)
    before = by_label(model.head(y).argmax(-1) == wanted, wanted)
    worse = []
    for label in range(LABELS):
        parts = y.unflatten(-1, (LABELS, -1)).clone()
        parts[:, own[label]] = parts[:, own[label]].mean(0)
        lost = before - by_label(model.head(parts.flatten(1)).argmax(-1) == wanted, wanted)
        worse.append(lost[label] > (lost.sum() - lost[label]) / (LABELS - 1))
    return float(np.mean(worse))


def by_label(hits: Tensor, wanted: Tensor) -> Tensor:
    return torch.stack([hits[wanted == label].double().mean() for label in range(LABELS)])
