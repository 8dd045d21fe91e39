"""A language in which attention is needed only now and then, so that heads must rest at other times.

Bigram with back-copying: the next token follows a fixed random table of bigrams, except after one of a few trigger
tokens, which is followed by the token before it. A document is drawn anew each time, so that nothing can be learnt by
heart. Documents are packed into windows, with or without a beginning token.

Paper: Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs, arXiv 2410.13835.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BOS = 0


@dataclass(frozen=True)
class SinkLanguage:
    """Draws batches for `train`. Token 0 is the beginning token: `bos="none"` never shows it, `"between"` puts it at
    the start of every document but the window's first, `"fixed"` at position 0 of the window only. `documents` of equal
    length share a window; `mask="causal"` lets tokens see earlier documents, `"document"` hides them."""

    words: int = 48
    triggers: int = 16
    length: int = 64
    rows: int = 32
    documents: int = 1
    bos: Literal["none", "between", "fixed"] = "none"
    mask: Literal["causal", "document"] = "causal"
    table_seed: int = 0

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        ids, document = self.window(generator)
        batch = {"input_ids": ids, "labels": ids}
        if self.mask == "document":
            seen = (document[:, None] == document[None]).tril()
            batch["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            batch["attention_mask"] = batch["attention_mask"].expand(len(ids), 1, -1, -1)
        return batch

    def window(self, generator: torch.Generator) -> tuple[Int[Tensor, "row token"], Int[Tensor, " token"]]:
        """Token ids, and the number of the document each place belongs to."""
        table = torch.rand(self.words, self.words, generator=torch.Generator().manual_seed(self.table_seed))
        table = torch.softmax(table * 12, -1)
        size = self.length // self.documents
        document = (torch.arange(self.length) // size).clamp(max=self.documents - 1)
        ids = torch.zeros(self.rows, self.length, dtype=torch.long)
        for place in range(self.length):
            fresh = place == 0 or document[place] != document[place - 1]
            if (self.bos == "fixed" and place == 0) or (self.bos == "between" and fresh and place > 0):
                continue  # the beginning token
            start = fresh or bool((ids[:, place - 1] == BOS).any())
            if start:
                drawn = torch.randint(self.words, (self.rows,), generator=generator)
            else:
                before = ids[:, place - 1] - 1
                drawn = torch.multinomial(table[before], 1, generator=generator)[:, 0]
                again = ids[:, place - 2] - 1 if place >= 2 else before
                back = (before < self.triggers) & (again >= 0)
                drawn = torch.where(back, again, drawn)
            ids[:, place] = drawn + 1
        return ids, document


def small_llama(language: SinkLanguage, layers: int = 1, width: int = 64, **changes: object) -> LlamaForCausalLM:
    """A decoder with rotary positions, small enough to train in a minute on one core."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": language.words + 1}
    limits = {"max_position_embeddings": 512, "bos_token_id": BOS, "eos_token_id": None, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes | limits | changes, tie_word_embeddings=False))
