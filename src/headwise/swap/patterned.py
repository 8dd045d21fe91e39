"""Encoders whose heads are built to keep to patterns that a person can name, and small ones beside a trained encoder.

A pattern is a name: "matching" (other places of the same token), "same" (the own sentence), "offset:-1" (the token
before), "offset:+2" ... Content patterns mask: weights within them are learned. Offsets are fixed: their keys get equal
weights, whatever queries and keys say. A query for which a pattern has no key attends to all keys, row 0 of the token
before as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attention.call import AttentionCall
from headwise.errors import HeadwiseError
from headwise.models.anatomy import find_sites
from headwise.models.open import Opened
from headwise.paper import Paper
from headwise.swap.attention import Attention
from headwise.swap.parts.scores import Score

PAPER = Paper(
    "Human Guided Exploitation of Interpretable Attention Patterns in Summarization and Topic Segmentation",
    "2112.05364",
)
PATTERNS = ("matching", "same", "offset:-1", "offset:+1")
"""The paper's four."""
Patterns = Sequence[str | None]
"""One for each head; None: the head is free."""


class FlatScore(Score):
    """The scaled dot product, and 0 in `heads`: equal weights on all keys that the mask leaves them."""

    def __init__(self, heads: Sequence[int]):
        super().__init__()
        self.heads = frozenset(heads)

    def forward(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch heads key dim"],
        call: AttentionCall,
    ) -> Float[Tensor, "batch heads query key"]:
        kept = q.new_tensor([float(head not in self.heads) for head in call.head_ids or ()])
        return super().forward(q, k, call) * kept[:, None, None]


def offset_of(pattern: str | None) -> int | None:
    """By how many places an offset pattern looks away; None of other patterns."""
    found = re.fullmatch(r"offset:([+-]?\d+)", pattern or "")
    return int(found[1]) if found else None


def checked(patterns: Patterns, heads: int) -> Patterns:
    wrong = [p for p in patterns if p not in (None, "matching", "same") and offset_of(p) is None]
    if wrong or len(patterns) != heads:
        raise HeadwiseError(
            f"patterns: wanted matching, same, offset:N or None for each of {heads} heads; got {list(patterns)}."
        )
    return tuple(patterns)


def spread(patterns: Sequence[str], per_pattern: int, heads: int) -> Patterns:
    """The paper's assignment: head `len(patterns) j + p` keeps to pattern p, for j below `per_pattern`."""
    if not 0 <= per_pattern * len(patterns) <= heads:
        raise HeadwiseError(
            f"heads_per_pattern: {len(patterns)} patterns in {per_pattern} heads each don't go into {heads} heads."
        )
    return (*tuple(patterns) * per_pattern, *[None] * (heads - per_pattern * len(patterns)))


def keys_of_patterns(
    patterns: Patterns,
    ids: Int[Tensor, "batch token"],
    sentences: Int[Tensor, "batch token"] | None = None,
    valid: Bool[Tensor, "batch token"] | None = None,
    special: Sequence[int] = (),
) -> Bool[Tensor, "batch heads token token"]:
    """Which keys each head may see, as a mechanism's `mask` wants it. `special` tokens match nothing. Padding is never
    seen, and no row is empty."""
    place = torch.arange(ids.shape[1], device=ids.device)
    there = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    free = there[:, None].expand(-1, ids.shape[1], -1)
    found: dict[str | None, Tensor] = {None: free}
    for pattern in dict.fromkeys(patterns):
        by = offset_of(pattern)
        if pattern is None:
            continue
        if by is not None:
            held = (place - place[:, None] == by).expand_as(free)
        elif pattern == "same":
            if sentences is None:
                raise HeadwiseError('keys_of_patterns: the pattern "same" wants the sentences of the tokens.')
            held = sentences[:, :, None] == sentences[:, None]
        else:
            plain = ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device))
            held = (ids[:, :, None] == ids[:, None]) & (place != place[:, None]) & plain[:, None]
        held = held & free
        found[pattern] = torch.where(held.any(-1, keepdim=True), held, free)
    return torch.stack([found[pattern] for pattern in patterns], 1)


def attention(dim: int, patterns: Patterns) -> Attention:
    """Attention whose offset heads are flat."""
    fixed = [head for head, pattern in enumerate(patterns) if offset_of(pattern) is not None]
    return Attention(dim, len(patterns), bias=True, score=FlatScore(fixed) if fixed else None)


class PatternedEncoder(nn.Module):
    """`encoder(ids, sentences, valid) -> [batch, token, dim]`: a small transformer (pre-norm, learned positions). In
    each of its layers `heads_per_pattern` heads are built to keep to each of `patterns`; the others are free."""

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        heads: int,
        layers: int,
        length: int,
        heads_per_pattern: int = 1,
        patterns: Sequence[str] = PATTERNS,
        special: Sequence[int] = (),
    ):
        super().__init__()
        self.patterns = checked(spread(patterns, heads_per_pattern, heads), heads)
        self.special = tuple(special)
        self.embed, self.place = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(dim),
                    "attention": attention(dim, self.patterns),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
                    ),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        ids: Int[Tensor, "batch token"],
        sentences: Int[Tensor, "batch token"] | None = None,
        valid: Bool[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        seen = keys_of_patterns(self.patterns, ids, sentences, valid, self.special)
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = x + layer["attention"](layer["norm"](x), mask=seen)
            x = x + layer["mlp"](x)
        return self.norm(x)


class PAL(nn.Module):
    """A projected attention layer: `gelu(W_up attention(W_down x))`, `width` wide inside; W_up starts at 0."""

    paper: ClassVar[Paper] = PAPER

    def __init__(self, dim: int, width: int = 256, heads: int = 4, patterns: Patterns | None = None):
        super().__init__()
        self.patterns = checked((None,) * heads if patterns is None else patterns, heads)
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.attention = attention(width, self.patterns)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(
        self, x: Float[Tensor, "batch token dim"], seen: Bool[Tensor, "batch heads token token"] | None = None
    ) -> Float[Tensor, "batch token dim"]:
        """seen: what `keys_of_patterns` says of its patterns."""
        return nn.functional.gelu(self.up(self.attention(self.down(x), mask=seen)))


class PALEncoder(nn.Module):
    """A trained encoder with a PAL beside each layer: what it gives of the layer's input is added to the layer's output
    (behind its last norm in post-norm models). It starts as the encoder itself; the encoder's own parameters stay as
    they are unless `frozen` is False.

    >>> model = swap.PALEncoder(bert, patterns=swap.PATTERNS, special=tokenizer.all_special_ids)
    >>> out = model(input_ids, sentences=sentences, attention_mask=mask)
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        model: Opened | nn.Module,
        width: int = 256,
        heads: int = 4,
        patterns: Patterns | None = None,
        special: Sequence[int] = (),
        frozen: bool = True,
    ):
        super().__init__()
        self.model = model.model if isinstance(model, Opened) else model
        sites = [site for site in find_sites(self.model) if site.kind == "self"]
        if not sites or any(getattr(site.module, "is_causal", False) for site in sites):
            raise HeadwiseError(f"PALEncoder wants an encoder of transformers; got {type(self.model).__name__}.")
        if frozen:
            self.model.requires_grad_(False)
        self.special = tuple(special)
        self._layers = tuple(layer_around(self.model, site.name) for site in sites)
        like = sites[0].W_Q
        self.pals = nn.ModuleList(PAL(site.W_Q.shape[1], width, heads, patterns) for site in sites).to(like)

    def forward(
        self, input_ids: Int[Tensor, "batch token"], sentences: Int[Tensor, "batch token"] | None = None, **given: Any
    ) -> Any:
        """`sentences`: numbers of each token's sentence; the rest is what the encoder takes."""
        mask = given.get("attention_mask")
        patterns = self.pals[0].patterns
        valid = None if mask is None else mask.bool()
        seen = keys_of_patterns(patterns, input_ids, sentences, valid, self.special)  # type: ignore[arg-type]
        hooks = [
            layer.register_forward_hook(beside(pal, seen), with_kwargs=True)
            for layer, pal in zip(self._layers, self.pals, strict=True)
        ]
        try:
            return self.model(input_ids=input_ids, **given)
        finally:
            for hook in hooks:
                hook.remove()


def beside(pal: nn.Module, seen: Tensor) -> Callable[..., Any]:
    def hook(_layer: nn.Module, args: tuple, given: dict[str, Any], out: Any) -> Any:
        extra = pal(args[0] if args else given["hidden_states"], seen)
        return (out[0] + extra, *out[1:]) if isinstance(out, tuple) else out + extra

    return hook


def layer_around(model: nn.Module, name: str) -> nn.Module:
    """The whole layer that an attention module is in: what stands in a list."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return model.get_submodule(".".join(parts[: end + 1]))
    raise HeadwiseError(f"PALEncoder: {name} is in no list of layers.")
