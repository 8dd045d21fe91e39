"""Do words of one topic attend to each other?

Topics come from latent Dirichlet allocation over passages of the documents: a word belongs to topic t where
`p(t | word)` is at least `share`; words spread over topics, stop words, short and rare words belong to none. The
measures are those of `class_attention`, with all pieces of a word counted as one token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from headwise.attention.readings import Reading
from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened
from headwise.paper import Paper
from headwise.scan.class_attention import class_means, class_readings
from headwise.scan.needles import haystack
from headwise.scan.question import Column, Prompt, Question

WORD = re.compile(r"[^\W\d_]{3,}")
DESCRIBED = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
"""Data sets that scikit-learn carries with a description."""


class Labelled(NamedTuple):
    """Of every token: its topic, and the number of its word; -1 where the word has no topic."""

    topics: Int[Tensor, " token"]
    words: Int[Tensor, " token"]


@dataclass(frozen=True)
class TopicAttention(Question):
    """`topic_attention`: mean attention to other words of one's topic over that to words of other topics, 1 where
    topics don't matter; `same_topic`, `other_topic` and `same_word` are the means themselves.

    `documents=()` are the shipped prose and the descriptions of six data sets that scikit-learn carries. Topics
    are fitted to passages of about 100 words; passages of about 40 are shuffled into `texts` texts of up to `length`
    tokens, so that a topic is not one place of the text."""

    documents: tuple[str, ...] = ()
    topics: int = 5
    share: float = 0.6
    texts: int = 4
    length: int = 256
    first_seed: int = 0
    paper: ClassVar[Paper] = Paper(
        "How Do Transformers Learn Topic Structure: Towards a Mechanistic Understanding", "2303.04245"
    )

    def __post_init__(self) -> None:
        if self.topics < 2 or not 0 < self.share <= 1 or self.texts < 1:
            raise HeadwiseError(
                "TopicAttention wants at least 2 topics, a share between 0 and 1 and at least one text; got "
                f"topics={self.topics}, share={self.share}, texts={self.texts}."
            )

    def columns(self) -> tuple[Column, ...]:
        weight = "mean weight"
        return (
            Column(
                "topic_attention",
                "Topic attention",
                "Attention to another word of the same topic, as a multiple of that to a word of another topic.",
                "times",
                "keeps to the topic",
            ),
            Column("same_topic", "Same topic", "Mean weight of another word of the topic.", weight, "looks there"),
            Column("other_topic", "Other topics", "Mean weight of a word of another topic.", weight, "looks there"),
            Column("same_word", "Same word", "Mean weight of the same word elsewhere.", weight, "looks there"),
        )

    def lacks(self, opened: Opened) -> str | None:
        text = any(site.stream == "text" and site.kind == "self" for site in opened.sites)
        return None if text and getattr(opened.tokenizer, "is_fast", False) else "text and a fast tokenizer"

    def streams(self, opened: Opened) -> Sequence[str]:
        return ["text"]

    def prompts(self, opened: Opened) -> list[Prompt]:
        documents = self.documents or bundled_documents()
        topics = topic_words(passages(documents, 100), self.topics, self.share, self.first_seed)
        prompts = []
        for text in shuffled_texts(opened, passages(documents, 40), self.texts, self.length, self.first_seed):
            prompts.append(Prompt(opened.encode(text), own=label_tokens(opened, text, topics)))
        return prompts

    def readings_at(self, opened: Opened, prompt: Prompt) -> list[Reading]:
        return class_readings(prompt.own.topics, prompt.own.words, "text")

    def reduce(self, values: xr.Dataset, prompt: Prompt) -> xr.Dataset:
        return class_means(values, prompt.own.topics, prompt.own.words)

    def score(self, values: xr.Dataset) -> dict[str, xr.DataArray]:
        return {
            "topic_attention": values["same_class"] / values["other"],
            "same_topic": values["same_class"],
            "other_topic": values["other"],
            "same_word": values["same_token"],
        }


def topic_words(documents: Sequence[str], topics: int, share: float, seed: int) -> dict[str, int]:
    """The topic of every word that has one, by latent Dirichlet allocation over the documents (prior 0.1 for a
    document's topics, as short passages are about one thing)."""
    text = need("sklearn.feature_extraction.text", "analysis")
    decomposition = need("sklearn.decomposition", "analysis")
    counter = text.CountVectorizer(stop_words="english", token_pattern=WORD.pattern, min_df=2)
    try:
        counts = counter.fit_transform(documents)
    except ValueError as error:
        raise HeadwiseError(f"documents: no word stands in two of the {len(documents)} passages ({error}).") from None
    found = decomposition.LatentDirichletAllocation(topics, doc_topic_prior=0.1, max_iter=50, random_state=seed).fit(
        counts
    )
    given = found.components_ / found.components_.sum(0)
    words = counter.get_feature_names_out()
    return {str(w): int(t) for w, t, p in zip(words, given.argmax(0), given.max(0), strict=True) if p >= share}


def label_tokens(opened: Opened, text: str, topics: Mapping[str, int]) -> Labelled:
    """The topics and words of a text's tokens; a piece of a word has the word's."""
    places = opened.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    numbers = {word: number for number, word in enumerate(topics)}
    found = torch.full((2, len(places)), -1)
    for match in WORD.finditer(text):
        word = match.group().lower()
        if word in topics:
            inside = [n for n, (a, b) in enumerate(places) if a < match.end() and b > match.start()]
            found[0, inside], found[1, inside] = topics[word], numbers[word]
    return Labelled(found[0], found[1])


def shuffled_texts(opened: Opened, passages: Sequence[str], texts: int, length: int, seed: int) -> list[str]:
    """Texts of up to `length` tokens, each of passages in a random order of its own."""
    sizes = [len(opened.tokenizer(passage + "\n")["input_ids"]) for passage in passages]
    if max(sizes) > length:
        raise HeadwiseError(f"length: a passage has {max(sizes)} tokens; got a length of {length}.")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(texts):
        chosen, total = [], 0
        for number in torch.randperm(len(passages), generator=generator).tolist():
            total += sizes[number]
            if total > length:
                break
            chosen.append(passages[number])
        found.append("\n".join(chosen))
    return found


def passages(documents: Sequence[str], words: int) -> list[str]:
    """Pieces of about `words` words, cut at the ends of sentences where there are any in time."""
    found = []
    for document in documents:
        piece: list[str] = []
        for word in document.split():
            piece.append(word)
            ended = word.rstrip('"”’)').endswith((".", "!", "?", ":"))
            if (len(piece) >= words / 2 and ended) or len(piece) >= 3 * words / 2:
                found.append(" ".join(piece))
                piece = []
        if piece:
            found.append(" ".join(piece))
    return found


def bundled_documents() -> list[str]:
    """The shipped prose and the descriptions of some data sets."""
    datasets = need("sklearn.datasets", "analysis")
    return [haystack(), *(getattr(datasets, f"load_{name}")().DESCR for name in DESCRIBED)]
