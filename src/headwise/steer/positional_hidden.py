"""Positional hidden scaling: a channel of the hidden states that carries the position, scaled for the last token.

The causal mask writes the place of a token into few channels of the residual stream, which grow or fall along the text
(`scan.positional_channels` finds them). In some layers, channel c of the attention's input x is multiplied by a factor,
for queries and keys only: `x'_c = factor x_c`, `q' = W_Q x'`, `k' = W_K x'`, `v = W_V x`. The last queries of a forward
pass attend with q' to k'; all queries before them with q to k, as without the method. The cache keeps k'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headwise.attention import Edit, Recompute, Recomputed
from headwise.attention.call import AttentionCall
from headwise.attention.hidden import incoming
from headwise.attention.seam import attention_inputs
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.models.anatomy import Site
from headwise.models.projections import fused_order, matrix_or_none
from headwise.models.weights import heads_of
from headwise.paper import Paper
from headwise.steer.choices import Choice, many_logprobs, shared_tokens, single_tokens
from headwise.steer.method import Method, apply

MIDDLE = (10 / 32, 25 / 32)
"""The layers the paper scales in a model of 32, as shares of the depth."""
FACTORS = (1.0, 0.5, 0.0, -0.5, -1.0)
_plain: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor, Tensor] | None] = WeakKeyDictionary()
"""What an attention module, under way, would have attended with; None where all its queries are scaled ones."""


@dataclass(frozen=True)
class PositionalHiddenScaling(Method):
    """Scales `channel` by `factor` (the paper's best are 0 and -1) in layers `layers` (first and last; None: 10 to 25
    of 32, at the model's depth), for the last `last_rows` queries of each sample. Where an answer of several tokens is
    scored in one pass, these are to be the answer's tokens plus one: `calibrate` and `study.evaluate` see to that,
    `option_logprobs` can't. Tokens before position `skip_first`, as the model is told positions, are not scaled.
    `change_value` scales the values too. A layer takes one such method at a time."""

    channel: int
    factor: float = 0.0
    layers: tuple[int, int] | None = None
    last_rows: int = 1
    change_value: bool = False
    skip_first: int = 0
    what: ClassVar[str] = "a channel that carries the position, scaled for the last token"
    paper: ClassVar[Paper] = Paper(
        "Mitigate Position Bias in Large Language Models via Scaling a Single Dimension", "2406.02536"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channel < 0 or self.last_rows < 0 or self.skip_first < 0:
            raise HeadwiseError(
                "PositionalHiddenScaling wants channel=, last_rows= and skip_first= of at least 0; got "
                f"{self.channel!r}, {self.last_rows!r} and {self.skip_first!r}."
            )
        if not math.isfinite(self.factor):
            raise HeadwiseError(f"PositionalHiddenScaling(factor=...) must be a finite number; got {self.factor!r}.")
        if self.layers is not None and (len(self.layers) != 2 or not 0 <= self.layers[0] <= self.layers[1]):
            raise HeadwiseError(
                f"PositionalHiddenScaling(layers=...) must be the first and the last layer; got {self.layers!r}."
            )

    def lacks(self, opened: Opened) -> str | None:
        sites = [site for site in opened.sites if site.stream == "text" and site.kind == "self"]
        if not sites:
            return "self-attention over text"
        if not all(scalable(site) for site in sites):
            return "query and key projections that headwise can tell from the rest"
        width = read_width(sites[0])
        return None if self.channel < width else f"a channel {self.channel}: hidden states have {width}"

    def sites(self, opened: Opened) -> list[Site]:
        """The attention layers that are changed."""
        every = [site for site in opened.sites if site.stream == "text" and site.kind == "self"]
        low, high = self.layers or (round(MIDDLE[0] * len(every)), round(MIDDLE[1] * len(every)))
        chosen = [site for site in every if low <= site.layer <= high]
        if not chosen or (self.layers is not None and high > every[-1].layer):
            raise HeadwiseError(
                f"PositionalHiddenScaling(layers=...): {opened.name} has layers 0 to {every[-1].layer}; got {low} to "
                f"{high}."
            )
        return chosen

    def answering(self, rows: int) -> Self:
        return replace(self, last_rows=self.last_rows + rows - 1) if self.last_rows else self

    @property
    def neutral(self) -> bool:
        return self.factor == 1 or self.last_rows == 0

    def edits(self, opened: Opened) -> list[Edit]:
        if self.neutral:
            return []
        return [Recompute(self.others, layer=[site.layer for site in self.sites(opened)])]

    @contextmanager
    def hooks(self, opened: Opened) -> Iterator[None]:
        place: list[Tensor | None] = [None]

        def placed(model: nn.Module, args: tuple, kwargs: dict) -> None:
            given = kwargs.get("position_ids")
            place[0] = given if given is not None and given.ndim == 2 else None

        with ExitStack() as stack:
            if not self.neutral:
                stack.callback(opened.model.register_forward_pre_hook(placed, with_kwargs=True).remove)
            for site in () if self.neutral else self.sites(opened):
                for handle in self.hooked(site, place):
                    stack.callback(handle.remove)
            yield

    def hooked(self, site: Site, place: list[Tensor | None]) -> Iterator[Any]:
        """Hooks of one layer: its projections read the scaled states, except when it is asked what it would do
        otherwise. `place` holds the positions of the tokens, where the model was given any."""
        asking = False
        past = 0

        def entering(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal asking, past
            x = incoming(module, args, kwargs)[1]
            past = cached(kwargs, site.layer)
            _plain[module] = None
            if x.shape[1] > self.last_rows:
                asking = True
                try:
                    _plain[module] = attention_inputs(module, args, kwargs)
                finally:
                    asking = False

        def scaled(x: Tensor) -> Tensor:
            at = place[0]
            at = past + torch.arange(x.shape[-2], device=x.device) if at is None else at.to(x.device)
            factors = x.new_ones(*at.shape, x.shape[-1])
            factors[..., self.channel] = torch.where(at < self.skip_first, x.new_ones(()), self.factor)
            return x * factors

        def reading(module: nn.Module, args: tuple) -> tuple | None:
            return None if asking else (scaled(args[0]), *args[1:])

        def mixing(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            if asking:
                return None
            mixed = module.forward(scaled(args[0]), *args[1:])
            mixed[..., rows] = out[..., rows]
            return mixed

        yield site.module.register_forward_pre_hook(entering, with_kwargs=True)
        found = site.projections
        assert found is not None  # `lacks` came first
        for module in (found.q, found.k, found.v if self.change_value else None):
            if module is not None:
                yield module.register_forward_pre_hook(reading)
        if found.fused is not None:
            rows = torch.zeros(0, dtype=torch.long) if self.change_value else value_rows(site)
            yield found.fused.register_forward_hook(mixing)

    def others(self, call: AttentionCall) -> Recomputed | None:
        """The queries before the last ones, with what they would have without the method."""
        assert call.site is not None
        if call.site.module not in _plain:
            raise HeadwiseError("PositionalHiddenScaling changes more than attention: use it with steer.apply.")
        taken = _plain.pop(call.site.module)
        if taken is None:
            return None
        q, k, v = taken
        new = call.i - call.j0
        keys = call.k.index_copy(2, new, k)
        values = call.v.index_copy(2, new, v) if self.change_value else None
        valid = call.valid()
        last = valid & (valid.flip(1).cumsum(1).flip(1) <= self.last_rows)
        return Recomputed(~last, q, keys, values)

    def calibrate(
        self,
        opened: Opened,
        examples: Sequence[Choice],
        channels: Sequence[int] | None = None,
        factors: Sequence[float] = FACTORS,
    ) -> Self:
        """A copy with the channel (of `channels`, as a scan found them; None: this one) that, scaled by this factor,
        raises the mean log-probability of the right answers most, and then the best of `factors` for it. 1, which
        changes nothing, is always among them: where nothing helps, nothing is changed."""

        def score(method: Self) -> float:
            return gold_logprob(opened, examples, method)

        alone = [replace(self, channel=channel) for channel in (channels or [self.channel])]
        best = alone[0] if len(alone) == 1 else max(alone, key=score)
        return max((replace(best, factor=f) for f in dict.fromkeys((1.0, *factors))), key=score)


def cached(kwargs: dict[str, Any], layer: int) -> int:
    """How many tokens a layer's cache holds before it is called with these arguments."""
    return max((int(x.get_seq_length(layer)) for x in kwargs.values() if hasattr(x, "get_seq_length")), default=0)


def gold_logprob(opened: Opened, examples: Sequence[Choice], method: Method) -> float:
    """Mean log-probability (nats) of the right answers under a method, all of their tokens written by it."""
    if not examples or any(example.gold is None for example in examples):
        raise HeadwiseError("examples: wanted one or more Choices whose gold is known.")
    alike: dict[int, list[Choice]] = {}
    for example in examples:
        alike.setdefault(answer_rows(opened, example), []).append(example)
    total = 0.0
    for rows, some in alike.items():
        with apply(opened, method.answering(rows)):
            found = many_logprobs(opened, some)
        total += sum(float(p[e.gold]) for p, e in zip(found, some, strict=True))  # type: ignore[index]
    return total / len(examples)


def answer_rows(opened: Opened, example: Choice) -> int:
    """How many queries of the pass that scores the right answer write it, the one behind it included."""
    prompt = opened.encode(example.prompt)["input_ids"][0]
    if single_tokens(opened, example, prompt) is not None:
        return 1
    answer = example.options[example.gold]  # type: ignore[index]
    text = opened.encode(example.prompt + answer)["input_ids"][0]
    return len(text) - shared_tokens(prompt, text, answer) + 1


def scalable(site: Site) -> bool:
    """Whether queries and keys have a projection of their own, or known rows of a common one."""
    found = site.projections
    if found is None or found.torch_mha or (found.k is not None and found.k is found.v):
        return False
    if found.fused is not None:
        return fused_order(site.module) is not None
    return out_rows(found.q) == site.heads * site.head_dim  # twice as many: a gate that must not be scaled


def out_rows(module: nn.Module | None) -> int:
    weight = None if module is None else matrix_or_none(module)
    return 0 if weight is None else len(weight)


def read_width(site: Site) -> int:
    found = site.projections
    assert found is not None
    weight = matrix_or_none(found.q or found.fused)  # type: ignore[arg-type]
    return 0 if weight is None else weight.shape[1]


def value_rows(site: Site) -> Int[Tensor, " row"]:
    """Which outputs of a common projection are values."""
    found = site.projections
    assert found is not None
    order = fused_order(site.module)
    assert order is not None
    return heads_of(torch.arange(out_rows(found.fused)), site, found, "v", order).flatten()
