"""Do the heads of trained models keep to the topic of a word?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise import scan
from headwise.models import Opened, open_model
from headwise.study.finding import Finding
from headwise.study.registry import study


@study(
    "topic_attention_real",
    paper=scan.TopicAttention.paper,
    room="scan",
    claim="In most heads of trained models words of one topic attend more to each other than to words of other topics.",
)
def topic_attention_real(
    models: Sequence[Any] = ("zoo:encoder", "zoo:llm"), seeds: Sequence[int] = range(5), texts: int = 6
) -> Finding:
    """Topics by latent Dirichlet allocation; texts of passages in random order. Control: topics shuffled among the
    words that have one, once a seed."""
    found: dict[str, dict[str, Any]] = {}
    for given in models:
        opened = given if isinstance(given, Opened) else open_model(given)
        prompts = scan.TopicAttention(texts=texts).prompts(opened)
        inputs, topics, words = zip(*((p.inputs, p.own.topics, p.own.words) for p in prompts), strict=True)
        real = ratios(opened, inputs, topics, words)
        control = [ratios(opened, inputs, redealt(topics, words, seed), words) for seed in seeds]
        found[opened.name] = {
            "share_above_1": (real > 1).mean(),
            "share_above_1_shuffled": np.mean([(x > 1).mean() for x in control]),
            "median_ratio": np.median(real),
            "median_ratio_shuffled": [np.median(x) for x in control],
        }
    holds = all(
        x["share_above_1"] > 0.5 and x["median_ratio"] > max(x["median_ratio_shuffled"]) for x in found.values()
    )
    said = [
        f"{name}: ratio above 1 in {x['share_above_1']:.0%} of heads, median {x['median_ratio']:.2f}, with shuffled "
        f"topics {x['share_above_1_shuffled']:.0%} and at most {max(x['median_ratio_shuffled']):.2f}"
        for name, x in found.items()
    ]
    return Finding(
        measured=found,
        expected="In each model a ratio above 1 in most heads, and a median above that of every shuffling of topics.",
        verdict="holds" if holds else "fails",
        reason="; ".join(said) + ".",
        model=", ".join(found),
        seeds=list(seeds),
    )


def ratios(opened: Opened, inputs: Sequence[Any], labels: Sequence[Tensor], words: Sequence[Tensor]) -> np.ndarray:
    seen = scan.class_attention(opened, inputs, labels, words)
    return (seen["same_class"] / seen["other"]).values


def redealt(labels: Sequence[Tensor], words: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The topics dealt out anew among the words that have one; all tokens of a word keep to one topic."""
    found = {
        word: topic
        for row, names in zip(labels, words, strict=True)
        for topic, word in zip(row.tolist(), names.tolist(), strict=True)
        if word >= 0
    }
    dealt = np.random.default_rng(seed).permutation(list(found.values())).tolist()
    topics = dict(zip(found, dealt, strict=True)) | {-1: -1}
    return [torch.tensor([topics[word] for word in row.tolist()]) for row in words]
