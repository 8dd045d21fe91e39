"""Does turning around the few heads that write a concept silence it, and does making them stronger bring it up?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch.nn.utils.rnn import pad_sequence

from headwise.models import Opened, open_model
from headwise.scan.needles import haystack
from headwise.steer import ConceptHeads, Method, apply, concept_tokens, head_rows, logit_lens, unembedding
from headwise.study.concept_heads import PAPER, chance, explained, ranked
from headwise.study.concepts import concepts
from headwise.study.evaluate import perplexity
from headwise.study.finding import Finding
from headwise.study.first_token_gain import interval
from headwise.study.induction import same_layers
from headwise.study.registry import study


@study(
    "concept_heads_steer",
    paper=PAPER,
    room="steer",
    claim="Turning a concept's few heads around makes its words less likely; five times their output, more frequent.",
)
def concept_heads_steer(
    model: Any = "zoo:llm",
    seeds: Sequence[int] = (0, 1, 2),
    counts: Sequence[int] = (3, 8),
    sentences: int = 24,
    continued: int = 20,
) -> Finding:
    """Heads are chosen on prompts that ask for a word of the concept. On other sentences: the change of the
    log-probability of the concept's token, and of all other tokens, with the heads times -1; as many random heads of
    the same layers. Beside it the heads times 0, those of the logit lens, and (ours) those of which the words explain
    most more than random tokens do ("over"). Continuations of neutral beginnings, sampled, with the
    heads times 5, and the share of the concept's tokens in them."""
    opened = model if isinstance(model, Opened) else open_model(model)
    whole = unembedding(opened)
    top = max(counts)
    beginnings = continuation(opened, [], seeds[0], continued)
    plain_perplexity = perplexity(opened, haystack(), length=96, windows=3)
    changes: dict[str, list[np.ndarray]] = {}
    rows: dict[str, Any] = {}
    for name, concept in concepts().items():
        tokens = concept_tokens(opened, concept.words)
        read = head_rows(opened, [prompt for half in concept.halves(seeds[0]) for prompt in half])
        scores = explained(opened, read, whole[tokens])
        order, over = ranked(opened, scores), ranked(opened, scores - chance(opened, read, len(tokens), seeds[0]))
        lens = ranked(opened, logit_lens(opened, read, whole[tokens]))
        batch = Sentences.of(opened, concept.sentences(seeds[0], sentences))
        plain = batch.scores(opened, [])
        settings = {f"top{n}": (order[:n], -1.0) for n in counts} | {f"top{n}_zero": (order[:n], 0.0) for n in counts}
        settings |= {f"lens{top}": (lens[:top], -1.0)} | {f"over{n}": (over[:n], -1.0) for n in counts}
        settings |= {
            f"random{n}_{seed}": (same_layers(opened, order[:n], order[:n], seed), -1.0)
            for n in counts
            for seed in seeds
        }
        for label, (heads, alpha) in settings.items():
            changed = batch.scores(opened, [ConceptHeads(heads=heads, alpha=alpha)]) - plain
            changes.setdefault(label, []).append(changed)
        strong = {
            "top": ConceptHeads(heads=order[:top], alpha=5.0),
            "random": ConceptHeads(heads=same_layers(opened, order[:top], order[:top], seeds[0]), alpha=5.0),
        }
        told = {n: share(continuation(opened, [m], seeds[0], continued), tokens) for n, m in strong.items()}
        turned = ConceptHeads(heads=order[:top], alpha=-1.0)
        rows[name] = {
            "heads": order[:top],
            "heads_over": over[:top],
            "change": {label: np.mean(values[-1], 0) for label, values in changes.items()},
            "share_plain": share(beginnings, tokens),
            "share_times_5": told["top"],
            "share_times_5_random": told["random"],
            "perplexity_factor": perplexity(opened, haystack(), [turned], length=96, windows=3) / plain_perplexity,
        }
    joined = {label: np.concatenate(values) for label, values in changes.items()}
    random = {n: np.mean([joined[f"random{n}_{seed}"] for seed in seeds], 0) for n in counts}
    tests = {}
    for n in counts:
        mine = joined[f"top{n}"]
        for label, gap in (("others", mine[:, 0] - mine[:, 1]), ("random", mine[:, 0] - random[n][:, 0])):
            mean, low, high = interval(gap[:, None])
            tests[f"top{n}_against_{label}"] = [mean[0], low[0], high[0]]
    more = {
        name: row["share_times_5"] > max(row["share_plain"], row["share_times_5_random"]) for name, row in rows.items()
    }
    less = all(high < 0 for _, _, high in tests.values())
    mean = {label: values.mean(0) for label, values in joined.items()}
    return Finding(
        measured={"change": mean, "tests": tests, "concepts": rows, "more_with_times_5": more},
        expected="With the top 3 and the top 8 heads times -1 the concept's tokens lose more than other tokens, and "
        "more than with random heads, with 95% certainty; with the top 8 times 5 their share in continuations rises "
        "above the plain and the random one in three of four concepts.",
        verdict="holds" if less and sum(more.values()) >= 0.75 * len(more) else "fails",
        reason="; ".join(
            f"the top {n} heads times -1 change the log-probability of the concept's tokens by "
            f"{mean[f'top{n}'][0]:+.2f} nats, of other tokens by {mean[f'top{n}'][1]:+.2f}, random heads by "
            f"{random[n][:, 0].mean():+.2f}"
            for n in counts
        )
        + f"; the {top} heads of which the words explain more than random tokens: {mean[f'over{top}'][0]:+.2f} and "
        + f"{mean[f'over{top}'][1]:+.2f}"
        + f"; times 5 the concept's share of a continuation rises most in {sum(more.values())} of {len(more)} concepts "
        + f"(from {np.mean([row['share_plain'] for row in rows.values()]):.1%} to "
        + f"{np.mean([row['share_times_5'] for row in rows.values()]):.1%}, random heads "
        + f"{np.mean([row['share_times_5_random'] for row in rows.values()]):.1%}); perplexity of prose times "
        + f"{np.mean([row['perplexity_factor'] for row in rows.values()]):.2f} with the top {top} times -1.",
        model=opened.name,
        seeds=list(seeds),
    )


@dataclass(frozen=True, eq=False)
class Sentences:
    """Sentences of one batch, padded on the right, and which of their tokens are the concept's."""

    ids: Int[Tensor, "sentence token"]
    mask: Int[Tensor, "sentence token"]
    concept: Bool[Tensor, "sentence token"]

    @classmethod
    def of(cls, opened: Opened, sentences: Sequence[tuple[str, tuple[int, int]]]) -> Sentences:
        ids, concept = [], []
        for text, (start, stop) in sentences:
            found = opened.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids.append(torch.tensor(found["input_ids"]))
            concept.append(torch.tensor([a < stop and b > start for a, b in found["offset_mapping"]]))
        mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        return cls(
            pad_sequence(ids, batch_first=True).to(opened.device),
            mask.to(opened.device),
            pad_sequence(concept, batch_first=True).to(opened.device),
        )

    @torch.no_grad()
    def scores(self, opened: Opened, methods: Sequence[Method]) -> Float[np.ndarray, "sentence 2"]:
        """Mean log-probability of the concept's tokens, and of all others but the first."""
        if methods:
            with apply(opened, *methods):
                logits = opened.model(input_ids=self.ids, attention_mask=self.mask).logits
        else:
            logits = opened.model(input_ids=self.ids, attention_mask=self.mask).logits
        logp = logits[:, :-1].float().log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0]
        mine, real = self.concept[:, 1:], self.mask[:, 1:].bool()
        columns = [(logp * part).sum(-1) / part.sum(-1).clamp(min=1) for part in (mine, real & ~mine)]
        return torch.stack(columns, -1).cpu().numpy()


BEGINNINGS = (
    "Last year I",
    "The next morning",
    "My favorite",
    "In the picture you can see",
    "He told me about",
    "It was",
)


@torch.no_grad()
def continuation(opened: Opened, methods: Sequence[Method], seed: int, count: int) -> Int[Tensor, "beginning token"]:
    """What the model writes behind neutral beginnings, sampled with a seed of its own."""
    batch = opened.encode([text for text in BEGINNINGS for _ in range(2)])
    options = {"max_new_tokens": count, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if methods:
            with apply(opened, *methods):
                ids = opened.model.generate(**batch, **options)
        else:
            ids = opened.model.generate(**batch, **options)
    return ids[:, batch["input_ids"].shape[1] :]


def share(ids: Int[Tensor, "text token"], tokens: Sequence[int]) -> float:
    """The part of the tokens that are the concept's."""
    return float(torch.isin(ids.cpu(), torch.tensor(list(tokens))).float().mean())
