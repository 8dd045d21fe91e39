"""Concept heads: the heads whose writing a concept's words explain, suppressed or enhanced.

A head's part in the residual stream, one row a sample at the last token of the prompt, is pursued (`somp`) in the
unembedding rows of the concept's tokens; the head's score is the variance they explain. The outputs of the best heads
are multiplied by alpha: -1 suppresses the concept, 5 enhances it, 0 ablates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention import Edit, HeadGain, HeadOutput, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, every_head, pairs
from headwise.steer.pursuit import somp


@dataclass(frozen=True)
class ConceptHeads(Method):
    """Multiplies the outputs of `heads` (from `calibrate`) by `alpha` at all positions."""

    heads: Heads = None
    alpha: float = -1.0
    what: ClassVar[str] = "a concept's heads suppressed or enhanced"
    paper: ClassVar[Paper] = Paper(
        "Head Pursuit: Probing Attention Specialization in Multimodal Transformers", "2510.21518"
    )

    def edits(self, opened: Opened) -> list[Edit]:
        if self.alpha == 1:
            return []
        chosen = pairs(self.heads, opened)
        if chosen is None:
            raise HeadwiseError("ConceptHeads wants heads=: call calibrate(opened, prompts, words).")
        return [HeadGain(gain=self.alpha, heads=chosen)]

    def calibrate(
        self, opened: Opened, prompts: Sequence[str], words: Sequence[str], count: int = 8, steps: int = 50
    ) -> Self:
        """A copy for the `count` heads that the words explain best."""
        scores = concept_scores(opened, prompts, words, steps)
        every = every_head(opened)
        if not 1 <= count <= len(every):
            raise HeadwiseError(f"count: wanted 1 to {len(every)} heads; got {count}.")
        best = sorted(every, key=lambda pair: -scores[pair])[:count]
        return replace(self, heads=tuple(sorted(best)))


def concept_scores(
    opened: Opened, prompts: Sequence[str], words: Sequence[str], steps: int = 50, center: bool = True
) -> Float[np.ndarray, "layer head"]:
    """Explained variance, 0 to 1, of every head's writing at the prompts' last tokens."""
    if len(prompts) < 2:
        raise HeadwiseError(f"prompts: wanted two or more, as a head is judged by how it varies; got {len(prompts)}.")
    dictionary = unembedding(opened)[concept_tokens(opened, words)]
    reading = HeadOutput(what="vector", queries=[-1], stream="text")
    rows = []
    for prompt in prompts:
        with attend(opened, readings=[reading]) as run, torch.no_grad():
            opened.model(**opened.encode(prompt))
        z = run.tree["text"]["head_output"].isel(sample=0, query=0).transpose("layer", "head", "channel")
        rows.append(torch.tensor(z.values, device=opened.device))
    outputs = torch.stack(rows)  # sample, layer, head, channel
    sites = [site for site in opened.sites if site.stream == "text"]
    scores = np.zeros(outputs.shape[1:3])
    for layer, site in enumerate(sites):
        for head in range(site.heads):
            written = outputs[:, layer, head] @ site.W_O[head].detach().to(outputs)
            found = somp(written, dictionary, steps, center=center)
            scores[layer, head] = float(found.explained[-1]) if len(found.explained) else 0.0
    return scores


def unembedding(opened: Opened) -> Float[Tensor, "vocabulary dim"]:
    """The unembedding rows, with the gain of the final norm in them: what raises a token's logit."""
    head = opened.model.get_output_embeddings() if hasattr(opened.model, "get_output_embeddings") else None
    if head is None:
        raise HeadwiseError(f"ConceptHeads needs a language model's unembedding; {opened.name} has none.")
    rows = head.weight.detach().float()
    base = getattr(opened.model, opened.model.base_model_prefix, opened.model)
    norm = getattr(base, "norm", None) or getattr(base, "ln_f", None) or getattr(base, "final_layer_norm", None)
    gain = getattr(norm, "weight", None)
    rows = rows if gain is None else rows * gain.detach().float()
    return rows - rows.mean(-1, keepdim=True) if getattr(norm, "bias", None) is not None else rows


def concept_tokens(opened: Opened, words: Sequence[str]) -> list[int]:
    """The tokens of words that are one token, with and without a leading space, as given and capitalised."""
    found: dict[int, None] = {}
    for word in words:
        for form in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
            ids = opened.tokenizer(form, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != opened.tokenizer.unk_token_id:
                found[ids[0]] = None
    if not found:
        raise HeadwiseError(f"words: none of {', '.join(list(words)[:5])} is one token of {opened.name}.")
    return list(found)
