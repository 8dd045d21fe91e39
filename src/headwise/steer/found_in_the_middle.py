"""Found in the middle: attention to documents without what they get for their place.

The attention a document gets is its relevance plus a term of its place, `Attn(x, k) = rel(x) + bias(k)`. The term is
measured with a dummy document put into the same place: `rel_k = Attn(x_k, k) - Attn(dummy, k)`, where `Attn(x, k)` is
the mean weight per token of document k from the last token of the prompt, over all layers and heads. Then the mass of
all documents is shared out anew: `a'_j = a_j g_k` for j in document k with `g_k = alpha_k M / A_k`, A_k the document's
mass, M the sum of all, `alpha = softmax(rel / t)`. Tokens of no document keep their weights exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention import Edit, Mass, Reweight, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.paper import Paper
from headwise.steer.method import Method, every_head

DUMMY = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore. "
EPS = 1e-9
"""A query with less mass than this on some document is left alone."""


@dataclass(frozen=True)
class FoundInTheMiddle(Method):
    """`documents` are segment names, `relevance` one number each (from `calibrate`, or your own). `temperature=None`
    takes a quarter of the relevances' standard deviation: the paper's 5e-5 is on the scale of its 3,000-token prompts.
    Without `first_layer` the upper half of the layers is changed; `queries` names those that do (None: all)."""

    documents: tuple[str, ...]
    relevance: tuple[float, ...] = ()
    temperature: float | None = None
    first_layer: int | None = None
    queries: str | None = None
    what: ClassVar[str] = "documents attended to by relevance, not by place"
    paper: ClassVar[Paper] = Paper(
        "Found in the Middle: Calibrating Positional Attention Bias Improves Long Context Utilization", "2406.16008"
    )

    def __post_init__(self) -> None:
        if len(self.documents) < 2:
            raise HeadwiseError(f"FoundInTheMiddle(documents=...) must name two or more; got {self.documents!r}.")
        if self.relevance and len(self.relevance) != len(self.documents):
            raise HeadwiseError(
                f"FoundInTheMiddle(relevance=...) must be one number for each of {len(self.documents)} documents; got "
                f"{len(self.relevance)}."
            )
        if self.temperature is not None and not self.temperature > 0:
            raise HeadwiseError(f"FoundInTheMiddle(temperature=...) must be above 0; got {self.temperature!r}.")

    def edits(self, opened: Opened) -> list[Edit]:
        if not self.relevance:
            raise HeadwiseError("FoundInTheMiddle wants relevance=: call calibrate(opened, before, docs, after).")
        layers = sorted({layer for layer, _ in every_head(opened)})
        first = len(layers) // 2 if self.first_layer is None else self.first_layer
        return [Reweight(self.rule, groups=self.documents, queries=self.queries, layer=tuple(layers[first:]))]

    @property
    def shares(self) -> Float[Tensor, " document"]:
        """alpha: the share of the documents' mass that each is given."""
        relevance = torch.tensor(self.relevance, dtype=torch.float64)
        t = 0.25 * float(relevance.std(correction=0)) if self.temperature is None else self.temperature
        return (relevance / t).softmax(-1) if t > 0 else torch.full_like(relevance, 1 / len(relevance))

    def rule(self, masses: Float[Tensor, "batch heads query document"]) -> Float[Tensor, "batch heads query document"]:
        """g_k = alpha_k M / A_k; 1 for queries that don't see every document."""
        whole = masses.sum(-1, keepdim=True)
        gains = self.shares.to(masses) * whole / masses.clamp(min=EPS)
        return torch.where((masses > EPS).all(-1, keepdim=True), gains, 1.0)

    def calibrate(
        self, opened: Opened, before: str, docs: Sequence[str], after: str, dummy: str = DUMMY, separator: str = "\n\n"
    ) -> Self:
        """A copy with the relevance of these documents in a prompt of `before`, the documents and `after`. One forward
        pass for the prompt and one for every place, in which the dummy, cut to the length of the document there, stands
        in for it."""
        if len(docs) != len(self.documents):
            raise HeadwiseError(f"docs: wanted {len(self.documents)} documents, got {len(docs)}.")
        own = attention_per_document(opened, before, docs, after, separator)
        bias = []
        for place, document in enumerate(docs):
            filler = cut_like(opened, dummy, document)
            with_dummy = [filler if n == place else other for n, other in enumerate(docs)]
            bias.append(attention_per_document(opened, before, with_dummy, after, separator)[place])
        return replace(self, relevance=tuple(float(a - b) for a, b in zip(own, bias, strict=True)))


def attention_per_document(
    opened: Opened, before: str, docs: Sequence[str], after: str, separator: str = "\n\n"
) -> Float[np.ndarray, " document"]:
    """Mean weight per token of each document from the prompt's last token, over all layers and heads."""
    batch, segments = Segments.from_documents(opened.tokenizer, list(docs), before, after, separator)
    names = [f"document {n + 1}" for n in range(len(docs))]
    batch = {name: value.to(opened.device) for name, value in batch.items()}
    with attend(opened, readings=[Mass(names, per="head", queries=[-1])], segments=segments) as run, torch.no_grad():
        opened.model(**batch)
    stream = "text" if "text" in run.tree.children else next(iter(run.tree.children))
    mass = run.tree[stream]["mass"].mean(("layer", "head")).sel(segment=names).values
    return mass / np.array([int(segments.mask(name).sum()) for name in names])


def cut_like(opened: Opened, dummy: str, document: str) -> str:
    """The dummy, repeated and cut to as many tokens as the document has."""
    tokenizer = opened.tokenizer
    length = len(tokenizer(document, add_special_tokens=False)["input_ids"])
    ids: list[int] = []
    while len(ids) < length:
        ids += tokenizer(dummy, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[:length]))
