"""Do the heads of trained models keep to the topic of a word?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise import scan
from headwise.models import Opened, open_model
from headwise.scan.topics import bundled_documents, label_tokens, passages, shuffled_texts, topic_words
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
    words that have one, once a seed. As the words of a passage are both near each other and of one topic, the ratio is
    reported for the same texts with all words in random order as well."""
    found: dict[str, dict[str, Any]] = {}
    question = scan.TopicAttention(texts=texts)
    documents = bundled_documents()
    known = topic_words(passages(documents, 100), question.topics, question.share, seed=0)
    for given in models:
        opened = given if isinstance(given, Opened) else open_model(given)
        written = shuffled_texts(opened, passages(documents, 40), texts, question.length, seed=0)
        inputs, topics, words = labelled(opened, written, known)
        real = ratios(opened, inputs, topics, words)
        control = [ratios(opened, inputs, redealt(topics, words, seed), words) for seed in seeds]
        order = np.random.default_rng(0)
        scrambled = [" ".join(order.permutation(text.split())) for text in written]
        found[opened.name] = {
            "share_above_1": (real > 1).mean(),
            "share_above_1_shuffled": np.mean([(x > 1).mean() for x in control]),
            "median_ratio": np.median(real),
            "median_ratio_shuffled": [np.median(x) for x in control],
            "median_ratio_words_in_random_order": np.median(ratios(opened, *labelled(opened, scrambled, known))),
        }
    holds = all(
        x["share_above_1"] > 0.5 and x["median_ratio"] > max(x["median_ratio_shuffled"]) for x in found.values()
    )
    said = [
        f"{name}: ratio above 1 in {x['share_above_1']:.0%} of heads, median {x['median_ratio']:.2f}, with shuffled "
        f"topics {x['share_above_1_shuffled']:.0%} and at most {max(x['median_ratio_shuffled']):.2f}, with words in "
        f"random order {x['median_ratio_words_in_random_order']:.2f}"
        for name, x in found.items()
    ]
    return Finding(
        measured=found,
        expected="In each model a ratio above 1 in most heads, and a median above that of every shuffling of topics.",
        verdict="holds" if holds else "fails",
        reason=(
            "; ".join(said) + ". Where random order takes the ratio away, nearness and syntax within passages make it, "
            "not the topic alone."
        ),
        model=", ".join(found),
        seeds=list(seeds),
    )


def labelled(
    opened: Opened, texts: Sequence[str], topics: Mapping[str, int]
) -> tuple[list[dict[str, Tensor]], list[Tensor], list[Tensor]]:
    """The model inputs of the texts, and the topics and words of their tokens."""
    found = [label_tokens(opened, text, topics) for text in texts]
    return [opened.encode(text) for text in texts], [x.topics for x in found], [x.words for x in found]


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
