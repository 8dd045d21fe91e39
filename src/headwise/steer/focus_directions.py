"""Focus directions: one small vector per head, added to its queries, that raises the attention to relevant text.

`q_i + alpha d` turns the scores by `alpha d . k_j` (times the scale): a bias of each key, the same for all queries. The
vectors are learnt, each layer by itself on its own cached queries and keys, to raise the mass that the answer's tokens
give to the relevant text: `loss = - mean over heads and answer tokens of sum_{j in relevant} a_ij`.

The paper adds a second vector to all keys as well. That cancels in the softmax: its gradient is 0, and it changes
nothing. It counts when it is added to some keys only, `(q_i + alpha d) . (k_j + alpha e)` for j of one segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention import Edit, Recompute, Shift, attend
from headwise.attention.call import AttentionCall
from headwise.attention.dense import weighed
from headwise.attention.effects import key_set, resolve
from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments
from headwise.paper import Paper
from headwise.steer.method import Heads, Method, by_layer, check_per_head, every_head, pairs


@dataclass(frozen=True, eq=False)
class Focus:
    """A text with its answer, and which of its tokens are "relevant" and "answer" by its segments."""

    ids: Tensor
    segments: Segments

    def __post_init__(self) -> None:
        for name in ("relevant", "answer"):
            if name not in self.segments or not self.segments.mask(name).any():
                given = list(self.segments)
                raise HeadwiseError(f"Focus(segments=...) must name tokens of a segment {name!r}; got {given}.")
        self.segments.validate(self.ids.shape[-1])


@dataclass(frozen=True, eq=False)
class FocusDirections(Method):
    """`directions` [layer, head, dim] from `calibrate`, times `alpha`, in `heads` (the contextual ones; None: all). The
    paper's alpha is 0.2; a negative one takes attention away from relevant text. With `keys`, a segment, its keys have
    `key_directions` as well, learnt beside the others."""

    directions: Float[Tensor, "layer head dim"] | None = None
    alpha: float = 0.2
    heads: Heads = None
    keys: str | None = None
    key_directions: Float[Tensor, "layer head dim"] | None = None
    what: ClassVar[str] = "a learnt vector a head that looks for relevant text"
    paper: ClassVar[Paper] = Paper(
        "Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts", "2503.23306"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_directions is not None and self.keys is None:
            raise HeadwiseError(
                "FocusDirections(keys=...) must name a segment where key_directions= are given: added to all keys they "
                "change nothing."
            )

        if not math.isfinite(self.alpha):
            raise HeadwiseError(f"FocusDirections(alpha=...) must be a finite number; got {self.alpha!r}.")

    def edits(self, opened: Opened) -> list[Edit]:
        if self.alpha == 0:
            return []
        if self.directions is None or (self.keys is not None and self.key_directions is None):
            raise HeadwiseError("FocusDirections has no directions yet: call calibrate(opened, examples).")
        for name in ("directions", "key_directions"):
            if getattr(self, name) is not None:
                check_per_head(f"FocusDirections({name}=...)", getattr(self, name), opened)
        edits: list[Edit] = []
        for layer, heads in by_layer(pairs(self.heads, opened) or every_head(opened)).items():
            edits.append(Shift(q=self.alpha * self.directions[layer, heads], layer=layer, heads=heads))
            if self.key_directions is not None:
                moved = self.alpha * self.key_directions[layer, heads]
                edits.append(Shift(k=moved, tokens=self.keys, layer=layer, heads=heads))
        return edits

    def calibrate(
        self,
        opened: Opened,
        examples: Sequence[Focus],
        epochs: int = 10,
        lr: float = 1e-3,
        loss: Literal["mass", "log_mass"] = "mass",
        seed: int = 0,
    ) -> Self:
        """A copy with directions learnt on the examples in a new order every epoch, starting at normal numbers of
        standard deviation 0.01. One forward pass an example, the rest on what it left; the model's weights are not
        touched. Where few examples make few steps, `lr` has to be larger: AdamW moves a number by at most about `lr` a
        step, and the paper takes thousands."""
        if not examples or loss not in ("mass", "log_mass") or epochs < 1:
            raise HeadwiseError(
                f'calibrate wants examples, epochs= of at least 1 and loss= "mass" or "log_mass"; got {len(examples)}, '
                f"{epochs!r} and {loss!r}."
            )
        sites = [site for site in opened.sites if site.stream == "text"]
        shape = (2, 1 + max(s.layer for s in sites), max(s.heads for s in sites), max(s.head_dim for s in sites))
        draw = torch.Generator().manual_seed(seed)
        both = (0.01 * torch.randn(shape, generator=draw)).to(opened.device).requires_grad_()
        optimizer = torch.optim.AdamW([both], lr=lr)
        cached = [Cached.of(opened, example, self.keys) for example in examples]
        for _ in range(epochs):
            for n in torch.randperm(len(cached), generator=draw).tolist():
                with torch.enable_grad():
                    mass = cached[n].mass(both[0], both[1])
                    (-(mass if loss == "mass" else mass.clamp(min=1e-9).log()).mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
        directions, key_directions = both.detach().cpu()
        return replace(self, directions=directions, key_directions=None if self.keys is None else key_directions)


@dataclass(frozen=True)
class Cached:
    """The attention calls of one example, by layer, of the answer's queries alone: with the scale, soft cap, window and
    sinks of the model's own."""

    calls: dict[int, AttentionCall]
    keys: str | None = None
    """The segment whose keys have a direction of their own."""

    @classmethod
    def of(cls, opened: Opened, example: Focus, keys: str | None = None) -> Cached:
        answer = example.segments.mask("answer").flatten().nonzero().flatten().cpu()
        calls: dict[int, AttentionCall] = {}

        def keep(call: AttentionCall) -> None:
            assert call.site is not None
            few, exact = call.select(rows=answer), torch.promote_types(call.q.dtype, torch.float32)
            calls[call.site.layer] = replace(few, q=few.q.to(exact), k=few.k.to(exact))

        with attend(opened, edits=[Recompute(keep, stream="text")], segments=example.segments), torch.no_grad():
            opened.model(input_ids=example.ids.reshape(1, -1).to(opened.device))
        return cls(calls, keys)

    def mass(
        self, directions: Float[Tensor, "layer head dim"], key_directions: Float[Tensor, "layer head dim"]
    ) -> Float[Tensor, "layer head answer"]:
        """What the answer's queries, with these directions, give to the relevant text."""
        found = []
        for layer, call in self.calls.items():
            heads = list(range(call.heads))
            edits: list[tuple[Edit, list[int]]] = [(Shift(q=directions[layer]), heads)]
            if self.keys is not None:
                edits.append((Shift(k=key_directions[layer], tokens=self.keys), heads))
            relevant = key_set(call, "relevant").mask
            assert relevant is not None
            found.append((weighed(resolve(call, edits)).a[0] * relevant[0]).sum(-1))
        return torch.stack(found)
