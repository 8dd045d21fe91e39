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
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention import Edit, Mass, Reweight, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.paper import Paper
from headwise.steer.method import Method, check_per_head, every_head
from headwise.steer.prompts import LAST

DUMMY = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore. "
EPS = 1e-9
"""A query with less mass than this on some document is left alone."""
LAST_AND_GENERATED = "last_and_generated"


@dataclass(frozen=True, eq=False)
class FoundInTheMiddle(Method):
    """`documents` are segment names, `relevance` one number each (from `calibrate`, or your own), or a tensor [layer,
    head, document]. `temperature=None` takes a quarter of the relevances' standard deviation: the paper's 5e-5 is on
    the scale of its 3,000-token prompts. Without `first_layer` the upper half of the layers is changed.

    `queries="last_and_generated"` changes the tokens that write the answer, of segments from `steer.mark_last`; another
    name changes that segment, None all queries. With `lengths` (tokens of each document) the new masses go as
    `alpha_k N_k`, as in the paper's formula, which divides by mean weights; without, as alpha_k."""

    documents: tuple[str, ...]
    relevance: tuple[float, ...] | Float[Tensor, "layer head document"] = ()
    temperature: float | None = None
    first_layer: int | None = None
    queries: str | None = LAST_AND_GENERATED
    lengths: tuple[int, ...] = ()
    what: ClassVar[str] = "documents attended to by relevance, not by place"
    paper: ClassVar[Paper] = Paper(
        "Found in the Middle: Calibrating Positional Attention Bias Improves Long Context Utilization", "2406.16008"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.documents)
        if count < 2:
            raise HeadwiseError(f"FoundInTheMiddle(documents=...) must name two or more; got {self.documents!r}.")
        given = torch.as_tensor(self.relevance)
        fitting = given.shape[-1] == count and given.ndim in (1, 3) and bool(given.isfinite().all())
        if given.numel() and not fitting:
            raise HeadwiseError(
                f"FoundInTheMiddle(relevance=...) must be a finite number for each of {count} documents, or [layer, "
                f"head, document]; got {self.relevance if given.ndim == 1 else tuple(given.shape)!r}."
            )
        if self.temperature is not None and not self.temperature > 0:
            raise HeadwiseError(f"FoundInTheMiddle(temperature=...) must be above 0; got {self.temperature!r}.")
        if self.lengths and (len(self.lengths) != count or min(self.lengths) < 1):
            raise HeadwiseError(
                f"FoundInTheMiddle(lengths=...) must be one number above 0 for each of {count} documents; got "
                f"{self.lengths!r}."
            )

    def edits(self, opened: Opened) -> list[Edit]:
        if not len(self.relevance):
            raise HeadwiseError("FoundInTheMiddle wants relevance=: call calibrate(opened, before, docs, after).")
        every = every_head(opened)
        layers = sorted({layer for layer, _ in every})
        first = len(layers) // 2 if self.first_layer is None else self.first_layer
        if first not in layers:
            raise HeadwiseError(
                f"FoundInTheMiddle(first_layer=...) must be a layer of {opened.name}, 0 to {layers[-1]}; got {first}."
            )
        chosen = tuple(layers[first:])
        shares = self.shares
        if shares.ndim == 3:
            check_per_head("FoundInTheMiddle(relevance=...)", shares, opened)
        rows = (LAST, "generated") if self.queries == LAST_AND_GENERATED else (self.queries,)
        places = (
            [(shares, {"layer": chosen})]
            if shares.ndim == 1
            else [(shares[pair], {"heads": [pair]}) for pair in every if pair[0] in chosen]
        )
        return [
            Reweight(partial(self.rule, shares=share), groups=self.documents, queries=row, **where)
            for share, where in places
            for row in rows
        ]

    @property
    def shares(self) -> Float[Tensor, "*layer_head document"]:
        """The share of the documents' mass that each is given: alpha, or alpha_k N_k over their sum."""
        relevance = torch.as_tensor(self.relevance, dtype=torch.float64)
        spread = relevance.std(-1, correction=0, keepdim=True)
        t = 0.25 * spread if self.temperature is None else torch.full_like(spread, self.temperature)
        # Where all are as relevant as each other they get the same share, whatever the temperature.
        alpha = torch.where(spread > 0, relevance / t.clamp(min=1e-300), 0.0).softmax(-1)
        weighed = alpha * torch.tensor(self.lengths or [1] * len(self.documents), dtype=alpha.dtype)
        return weighed / weighed.sum(-1, keepdim=True)

    @staticmethod
    def rule(
        masses: Float[Tensor, "batch heads query document"], shares: Float[Tensor, " document"]
    ) -> Float[Tensor, "batch heads query document"]:
        """g_k = alpha_k M / A_k; 1 for queries that don't see every document."""
        whole = masses.sum(-1, keepdim=True)
        gains = shares.to(masses) * whole / masses.clamp(min=EPS)
        return torch.where((masses > EPS).all(-1, keepdim=True), gains, 1.0)

    def calibrate(
        self,
        opened: Opened,
        before: str,
        docs: Sequence[str],
        after: str,
        dummy: str = DUMMY,
        separator: str = "\n\n",
        scope: Literal["global", "head"] = "global",
    ) -> Self:
        """A copy with the relevance of these documents in a prompt of `before`, the documents and `after`. One forward
        pass for the prompt and one for every place, in which the dummy, cut to the length of the document there, stands
        in for it. `scope="head"` keeps a relevance for every head, where the paper takes their mean."""
        if len(docs) != len(self.documents):
            raise HeadwiseError(f"docs: wanted {len(self.documents)} documents, got {len(docs)}.")
        if scope not in ("global", "head"):
            raise HeadwiseError(f'scope: wanted "global" or "head"; got {scope!r}.')
        own = attention_per_document(opened, before, docs, after, separator)
        relevance = own - place_attention(opened, before, docs, after, dummy, separator)
        return replace(self, relevance=relevance if scope == "head" else tuple(relevance.mean((0, 1)).tolist()))


def attention_per_document(
    opened: Opened, before: str, docs: Sequence[str], after: str, separator: str = "\n\n"
) -> Float[Tensor, "layer head document"]:
    """Mean weight per token of each document from the prompt's last token."""
    if not docs or not all(document.strip() for document in docs):
        raise HeadwiseError(f"docs: wanted one or more texts, none of them empty; got {list(docs)!r}.")
    batch, segments = Segments.from_documents(opened.tokenizer, list(docs), before, after, separator)
    names = [f"document {n + 1}" for n in range(len(docs))]
    batch = {name: value.to(opened.device) for name, value in batch.items()}
    with attend(opened, readings=[Mass(names, per="head", queries=[-1])], segments=segments) as run, torch.no_grad():
        opened.model(**batch)
    stream = "text" if "text" in run.tree.children else next(iter(run.tree.children))
    mass = run.tree[stream]["mass"].sel(segment=names).transpose("layer", "head", "segment").values
    return torch.tensor(mass, dtype=torch.float64) / torch.tensor([int(segments.mask(name).sum()) for name in names])


def place_attention(
    opened: Opened, before: str, docs: Sequence[str], after: str, dummy: str = DUMMY, separator: str = "\n\n"
) -> Float[Tensor, "layer head document"]:
    """What a document gets for its place alone: the attention to a dummy put there, the others left as they are."""
    found = []
    for place, document in enumerate(docs):
        filler = cut_like(opened, dummy, document)
        with_dummy = [filler if n == place else other for n, other in enumerate(docs)]
        found.append(attention_per_document(opened, before, with_dummy, after, separator)[..., place])
    return torch.stack(found, -1)


def cut_like(opened: Opened, dummy: str, document: str) -> str:
    """The dummy, repeated and cut to as many tokens as the document has."""
    tokenizer = opened.tokenizer
    length = len(tokenizer(document, add_special_tokens=False)["input_ids"])
    words = tokenizer(dummy, add_special_tokens=False)["input_ids"]
    if not words:
        raise HeadwiseError(f"dummy: wanted a text of at least one word; got {dummy!r}.")
    return str(tokenizer.decode((words * (1 + length // len(words)))[:length]))
