"""Do a few heads write a concept's words, and does turning them around silence the concept?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headwise.extras import need
from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.needles import haystack
from headwise.steer import ConceptHeads, Method, apply, concept_tokens, head_pursuit, head_rows, logit_lens, unembedding
from headwise.steer.method import every_head
from headwise.study.concepts import concepts
from headwise.study.evaluate import perplexity
from headwise.study.finding import Finding
from headwise.study.first_token_gain import interval
from headwise.study.induction import Heads, same_layers
from headwise.study.registry import study

PAPER = Paper("Head Pursuit: Probing Attention Specialization in Multimodal Transformers", "2510.21518")
STEPS = 20
Scores = Float[np.ndarray, "layer head"]


@study(
    "concept_heads_specialise",
    paper=PAPER,
    room="steer",
    claim="A concept's words explain what a few heads write: the same on other prompts, others for other concepts.",
)
def concept_heads_specialise(model: Any = "zoo:llm", seed: int = 0, top: int = 8) -> Finding:
    """Variance explained by the words of four concepts (20 steps of matching pursuit in their unembedding rows) at the
    last token of prompts that ask for one of them, on two halves of the prompts that share no cue. Beside it, with as
    many random words, and without taking off the mean row."""
    opened = model if isinstance(model, Opened) else open_model(model)
    draw = np.random.default_rng(seed)
    whole = unembedding(opened)
    spearman = need("scipy.stats", "analysis").spearmanr
    rows, best = {}, {}
    for name, concept in concepts().items():
        tokens = concept_tokens(opened, concept.words)
        halves = [head_rows(opened, prompts) for prompts in concept.halves(seed)]
        one, two = (explained(opened, h, whole[tokens]) for h in halves)
        together = torch.cat(halves)
        both = explained(opened, together, whole[tokens])
        other = explained(opened, together, whole[draw.choice(len(whole), len(tokens), replace=False)])
        kept = explained(opened, together, whole[tokens], center=False)
        best[name] = [ranked(opened, one)[:top], ranked(opened, two)[:top]]
        layer, head = ranked(opened, both)[0]
        rows[name] = {
            "tokens": len(tokens),
            "prompts": len(together),
            "top_heads": ranked(opened, both)[:top],
            "explained_top": both[layer, head],
            "explained_median": np.median(both),
            "explained_top_random_words": other.max(),
            "explained_median_random_words": np.median(other),
            "spearman_of_halves": spearman(one.ravel(), two.ravel()).statistic,
            "top_without_centring": ranked(opened, kept)[0],
            "words_of_top": words(opened, together, (layer, head)),
        }
    within = {name: jaccard(*pair) for name, pair in best.items()}
    across = [jaccard(best[a][0], best[b][1]) for a, b in combinations(best, 2)]
    ratio = {name: row["explained_top"] / row["explained_median"] for name, row in rows.items()}
    stable = [row["spearman_of_halves"] for row in rows.values()]
    holds = min(ratio.values()) > 3 and min(stable) > 0.5 and min(within.values()) > np.mean(across)
    return Finding(
        measured={
            "concepts": rows,
            "top_over_median": ratio,
            "shared_top_heads_of_halves": within,
            "shared_top_heads_of_concepts": across,
        },
        expected="In every concept the top head's explained variance is 3 times the median head's, the scores of the "
        "halves correlate above 0.5 in rank, and their top heads overlap (Jaccard) more than those of two concepts.",
        verdict="holds" if holds else "fails",
        reason=(
            f"The top head's explained variance is {', '.join(f'{x:.1f}' for x in ratio.values())} times the median's "
            f"({', '.join(rows)}); the halves correlate by {min(stable):.2f} to {max(stable):.2f}, their top {top} "
            f"heads overlap by {np.mean(list(within.values())):.2f}, those of two concepts by {np.mean(across):.2f}."
        ),
        model=opened.name,
        seeds=[seed],
    )


def explained(opened: Opened, rows: Tensor, dictionary: Tensor, center: bool = True) -> Scores:
    return head_pursuit(opened, rows, dictionary, STEPS, center=center)["explained"].values[..., -1]


def ranked(opened: Opened, scores: Scores) -> Heads:
    """All heads, those of high scores first."""
    return sorted(every_head(opened), key=lambda pair: -scores[pair])


def words(opened: Opened, rows: Tensor, pair: tuple[int, int], steps: int = 6) -> list[str]:
    """What one head writes, read with the whole vocabulary."""
    atoms = head_pursuit(opened, rows, steps=steps, heads=[pair])["atom"].values[pair]
    return [str(opened.decode([int(atom)])) for atom in atoms if atom >= 0]


def jaccard(one: Sequence[Any], other: Sequence[Any]) -> float:
    return len({*one} & {*other}) / len({*one} | {*other})


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
    log-probability of the concept's token, and of all other tokens, with the heads times -1 (and 0, and the heads of
    the logit lens, and as many random heads of the same layers); continuations of neutral beginnings, sampled, with the
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
        order = ranked(opened, explained(opened, read, whole[tokens]))
        lens = ranked(opened, logit_lens(opened, read, whole[tokens]))
        batch = Sentences.of(opened, concept.sentences(seeds[0], sentences))
        plain = batch.scores(opened, [])
        settings = {f"top{n}": (order[:n], -1.0) for n in counts} | {f"top{n}_zero": (order[:n], 0.0) for n in counts}
        settings |= {f"lens{top}": (lens[:top], -1.0)}
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
