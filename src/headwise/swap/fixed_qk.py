"""Attention whose queries and keys don't come from the states of its layer, but from a stream of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.open import Opened
from headwise.paper import Paper
from headwise.swap.attention import Attention, Heads, split
from headwise.swap.cache import Cache
from headwise.swap.gated_mlp import PAPER
from headwise.swap.mechanism import Visible
from headwise.swap.parts.positions import Places

Source = Literal["random", "text", "static"]


class FixedQKAttention(Attention):
    """Values from the layer's input; queries and keys, with softmax, positions and mask as ever, from

    - "random": vectors drawn once (`vectors` [length, dim], or `length` of them from N(0, sigma^2)). By itself a
      layer projects them as they are; `FixedStream` sends them through the layers of its model first, as the paper does
    - "text": a fixed text, which needs the `FixedStream` that reads it
    - "static": the token embeddings of the current input, of root mean square 1 (the paper doesn't say whether they
      are normed; layers get normed states). By itself a layer takes its input for them, as it is in a first layer

    With random vectors and fixed texts the maps are the same for all inputs. Converted, it starts with the layer's
    projections but not with its output (but for "static" in the first layer, apart from its norm).
    """

    paper: ClassVar[Paper] = PAPER
    what: ClassVar[str] = "queries and keys from random vectors, a fixed text or the token embeddings"
    context_too: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        source: Source = "random",
        length: int = 2048,
        sigma: float = 1.0,
        vectors: Float[Tensor, "length dim"] | None = None,
        **parts: Any,
    ):
        super().__init__(dim, heads, kv_heads, head_dim, **parts)
        if source not in ("random", "text", "static"):
            raise HeadwiseError(f"FixedQKAttention: source is random, text or static; got {source!r}.")
        if vectors is not None and (vectors.ndim != 2 or vectors.shape[1] != dim):
            raise HeadwiseError(f"FixedQKAttention: vectors wants shape [length, {dim}]; got {tuple(vectors.shape)}.")
        self.source = source
        self.vectors: Tensor
        if source == "random":
            self.register_buffer("vectors", sigma * torch.randn(length, dim) if vectors is None else vectors)
        self.recording = False
        """This pass is the stream's own."""
        self.given: tuple[Heads, Heads] | Tensor | None = None
        """What the stream brings: queries and keys of this layer (random, text), or the embeddings (static)."""

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        context: Float[Tensor, "batch key dim"] | None = None,
        mask: Visible = None,
        positions: Int[Tensor, "#batch query"] | Places | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        if context is not None:
            raise HeadwiseError("FixedQKAttention takes queries and keys from its stream: leave out context.")
        return super().forward(x, None, mask, positions, cache)

    def project(
        self,
        x: Float[Tensor, "batch query dim"],
        source: Float[Tensor, "batch key dim"],
        here: Places,
        crossed: bool = False,
    ) -> tuple[Heads, Heads, Heads]:
        if self.recording:
            q, k, v = super().project(x, x, here)
            self.given = (q, k)
            return q, k, v
        v = split(self.v_proj(x), self.kv_heads)
        if self.source == "static":
            e: Any = x if self.given is None else self.given
            return *self.asked(e, here), v
        if isinstance(self.given, tuple):
            places = self.given[0].shape[2]
        elif self.source == "random":
            places = len(self.vectors)
        else:
            raise HeadwiseError("FixedQKAttention(source='text') needs the FixedStream that reads the text.")
        last = here.first + x.shape[1]
        if last > places:
            raise HeadwiseError(f"FixedQKAttention: the stream has no place {last - 1}: make it longer.")
        if isinstance(self.given, tuple):
            q, k = (part[0][:, here.ids].transpose(0, 1) for part in self.given)
        else:
            q, k = self.asked(self.vectors[here.ids].to(x), here)
        return q.expand(len(x), -1, -1, -1), k.expand(len(x), -1, -1, -1), v

    def asked(self, stream: Float[Tensor, "#batch token dim"], here: Places) -> tuple[Heads, Heads]:
        """The queries and keys of what is not the layer's input."""
        q = self.position.turn(self.q_norm(split(self.q_proj(stream), self.heads)), here)
        return q, self.position.turn(self.raw_keys(stream), here)


class FixedStream(nn.Module):
    """A model some of whose layers are FixedQKAttention, with the stream that they take queries and keys from.

    Random vectors (those of its first such layer) and texts (`text`: token ids) are one more sequence that goes through
    all layers of the model in every forward in training, with values from itself and with gradients; in eval mode what
    it left in the layers is kept until `renew()` or `train()`. Static embeddings are caught on their way.

    >>> model = swap.FixedStream(decoder, decoder.embed)
    """

    def __init__(
        self, model: Opened | nn.Module, embedding: nn.Module | None = None, text: Int[Tensor, " token"] | None = None
    ):
        super().__init__()
        inner = model.model if isinstance(model, Opened) else model
        self.model = inner
        layers = [m for m in inner.modules() if isinstance(m, FixedQKAttention)]
        sources = {layer.source for layer in layers}
        if len(sources) != 1:
            raise HeadwiseError(f"FixedStream wants FixedQKAttention layers of one source; got {sorted(sources)}.")
        self.source = sources.pop()
        if (text is not None) != (self.source == "text"):
            raise HeadwiseError(f"FixedStream(text=...) goes with layers of source 'text'; these are {self.source!r}.")
        if embedding is None:
            embedding = inner.get_input_embeddings()  # type: ignore[operator]
        self._parts = (layers, embedding)
        self.text: Tensor | None
        self.register_buffer("text", text)
        self._kept = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.source == "static":
            with self.hooked(self.caught):
                return self.model(*args, **kwargs)
        if self.training or not self._kept:
            self.read()
            self._kept = not self.training
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        self.renew()
        return super().train(mode)

    def renew(self) -> None:
        """Forgets what the stream left in the layers."""
        self._kept = False
        for layer in self._parts[0]:
            layer.given = None

    def read(self) -> None:
        """Sends the stream through the model, whose layers keep their queries and keys of it."""
        layers = self._parts[0]
        if self.text is None:
            vectors = layers[0].vectors[None]
            ids = torch.zeros(vectors.shape[:2], dtype=torch.long, device=vectors.device)
        else:
            vectors, ids = None, self.text[None]
        for layer in layers:
            layer.recording = True
        try:
            with self.hooked(lambda _m, _a, out: out if vectors is None else vectors.to(out)):
                self.model(input_ids=ids)
        finally:
            for layer in layers:
                layer.recording = False

    def caught(self, _module: nn.Module, _args: tuple, out: Tensor) -> None:
        for layer in self._parts[0]:
            layer.given = nn.functional.rms_norm(out, out.shape[-1:])

    @contextmanager
    def hooked(self, hook: Any) -> Iterator[None]:
        handle = self._parts[1].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
