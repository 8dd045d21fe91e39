"""A head as a map from tokens to tokens: what it writes into the logits when it reads one token and nothing else.

`M = f(E) W_V W_O U`, with E the embeddings, U the unembedding, and `f(e) = MLP_0(norm_0(e))` what the first block's
feed-forward part makes of a token by itself (without adding e; heads of layer 0 read e). No norm before the head or
before U counts, nor any bias. M is vocabulary x vocabulary and of rank head dim: only chosen rows of it are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.attention.hidden import hidden
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.models.anatomy import Site
from headwise.models.blocks import find_blocks
from headwise.scan.needs import lacks_language_model

CHUNK = 512
"""Tokens that go through the first block together."""


class _Enough(Exception):
    """Ends a forward pass once the first block has been seen."""


def lacks_token_map(opened: Opened, first_mlp: bool = True) -> str | None:
    """A causal language model with a tokenizer; for f, one whose first block has a plain feed-forward part."""
    if reason := lacks_language_model(opened):
        return reason
    if opened.tokenizer is None:
        return "a tokenizer, to find its words' tokens"
    if not first_mlp:
        return None
    try:
        first = find_blocks(opened.model, opened.sites, "text")[0]
    except HeadwiseError:
        return "blocks that stand in a list"
    return None if first.last is not None else "a feed-forward part in its first block that ends in one matrix"


def site_of(opened: Opened, layer: int, head: int = 0) -> Site:
    """The attention layer of the text stream, checked for having this head."""
    for site in opened.sites:
        if site.stream == "text" and site.layer == layer:
            if not 0 <= head < site.heads:
                raise HeadwiseError(f"head: layer {layer} has heads 0 to {site.heads - 1}; got {head}.")
            return site
    layers = [site.layer for site in opened.sites if site.stream == "text"]
    raise HeadwiseError(f"layer: the text has layers 0 to {max(layers, default=-1)}; got {layer}.")


@torch.no_grad()
def embedded(opened: Opened, ids: Int[Tensor, " token"]) -> Float[Tensor, "token model"]:
    """The embeddings e of tokens."""
    return opened.model.get_input_embeddings()(ids.to(opened.device)).float()


@torch.no_grad()
def after_first_mlp(opened: Opened, ids: Int[Tensor, " token"]) -> Float[Tensor, "token model"]:
    """f(e) of tokens: the model's own first block is run on each token alone, with its attention's output replaced by
    nothing, and left as soon as its feed-forward part has spoken."""
    found = []

    def enter(_layer: int, x: Tensor) -> Tensor:
        return opened.model.get_input_embeddings()(some).to(x.dtype)  # positions added to the embeddings don't count

    def leave(_layer: int, x: Tensor) -> None:
        found.append(x[:, 0].float())
        raise _Enough

    looks = {"block_in": enter, "attention_out": lambda _layer, x: torch.zeros_like(x), "mlp_out": leave}
    with hidden(opened, looks, layers=[0], stream="text"):
        for some in ids.to(opened.device)[:, None].split(CHUNK):
            try:
                opened.model(input_ids=some, use_cache=False)
            except _Enough:
                continue
            raise HeadwiseError(f"{opened.name} ran without its first block's feed-forward part: use first_mlp=False.")
    return torch.cat(found)


def sources(opened: Opened, ids: Int[Tensor, " token"], first_mlp: bool, layer: int) -> Float[Tensor, "token model"]:
    """What a head of this layer reads of tokens: e in layer 0, f(e) above it (e everywhere without `first_mlp`)."""
    return after_first_mlp(opened, ids) if first_mlp and layer else embedded(opened, ids)


def values(site: Site, read: Float[Tensor, "token model"], head: int) -> Float[Tensor, "token channel"]:
    """`read W_V` for the value head that this head looks through."""
    return read @ site.W_V[head // site.group].detach().float()


def unembedding(opened: Opened) -> Float[Tensor, "model vocabulary"]:
    return opened.model.get_output_embeddings().weight.detach().float().T


@torch.no_grad()
def token_map(
    opened: Opened, layer: int, head: int, rows: Sequence[int] | Int[Tensor, " token"], first_mlp: bool = True
) -> Float[Tensor, "token vocabulary"]:
    """Rows of M: the logits that one head writes for each source token in `rows`. Ask for few: a row is as long as the
    vocabulary."""
    site = site_of(opened, layer, head)
    read = sources(opened, torch.as_tensor(rows, dtype=torch.long), first_mlp, layer)
    return values(site, read, head) @ site.W_O[head].detach().float() @ unembedding(opened)
