"""Attention Buckets: several copies of the model, each with another rotary base, decide on the next token together.

Attention falls with the distance in ripples that depend on the rotary base (attention/waveform.py); what stands in a
trough of one base stands elsewhere for another. N copies of a prompt run in one batch, row n with base b_n and its own
part of the cache. Their logits z_n [V] become one prediction with weights `alpha = softmax_n(c_n)`, c_n the confidence
of a copy: `z = sum_n alpha_n z_n` (mix="logits", the released code), or `p = sum_n alpha_n softmax(z_n)` (mix="probs",
the paper's text).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention import Edit, Rebase, attend
from headwise.attention.carrier import Carrier
from headwise.attention.memory import kept
from headwise.attention.rope import GROWING, Rotary, find_rotary
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Method

TOOL_USE = (1.0, 1.75, 1.8, 1.9, 2.0, 2.5)
"""The paper's set for tool use: {10000, 17500, 18000, 19000, 20000, 25000} for models of base 10,000."""
DOCUMENTS = (1.0, 1.3, 1.6, 1.9, 2.2, 2.5, 2.8)
"""The paper's set for questions about documents: {10000, 13000, 16000, 19000, 22000, 25000, 28000}."""
CONFIDENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "max_logit": lambda z: z.amax(-1),
    "max_prob": lambda z: z.softmax(-1).amax(-1),
    "neg_entropy": lambda z: -torch.special.entr(z.softmax(-1)).sum(-1),
}


@dataclass(frozen=True)
class AttentionBuckets(Method):
    """`ratios` are the bases as multiples of the model's own. Under `apply` the model takes and gives what it always
    does, in `generate()` with beams and all caches too: the copies are made on the way in, and mixed on the way out. A
    cache filled before holds no copies and is refused. What else the model gives, its hidden states among it, has a row
    a copy.

    Prefill costs N times the plain model; a token less, as the copies share the reading of the weights. A large ratio
    harms the model: try each alone on some text (`study.evaluate.perplexity`) and leave out what harms."""

    ratios: tuple[float, ...] = TOOL_USE
    mix: Literal["logits", "probs"] = "logits"
    confidence: Literal["max_logit", "max_prob", "neg_entropy"] = "max_logit"
    what: ClassVar[str] = "copies with other rotary bases, mixed by their confidence"
    paper: ClassVar[Paper] = Paper(
        "Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for Effective "
        "Tool Use",
        "2312.04455",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratios or not all(0 < ratio < float("inf") for ratio in self.ratios):
            raise HeadwiseError(
                f"AttentionBuckets(ratios=...) must be one or more numbers above 0; got {self.ratios!r}."
            )

    @property
    def plain(self) -> bool:
        """One copy with the model's own base: nothing is changed."""
        return tuple(self.ratios) == (1.0,)

    def lacks(self, opened: Opened) -> str | None:
        model, rotary = opened.model, text_rotary(opened)
        writes = getattr(model, "can_generate", lambda: False)() and not model.config.is_encoder_decoder
        if rotary is None or not writes:
            return "a decoder-only language model with rotary positions headwise can read"
        kind = rotary.settings.get("rope_type")
        return f"a rotation that stays as it is, not the {kind} kind" if kind in GROWING else None

    def edits(self, opened: Opened) -> list[Edit]:
        if self.plain:
            return []
        rotary = text_rotary(opened)
        assert rotary is not None  # `lacks` came first
        return [Rebase(theta=torch.tensor(self.ratios, dtype=torch.float64) * rotary.base)]

    @contextmanager
    def hooks(self, opened: Opened) -> Iterator[None]:
        if self.plain:
            yield
            return
        hooks = opened.model._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), AttentionBuckets) for hook in hooks):
            raise HeadwiseError("AttentionBuckets: the model has its copies already: give all ratios to one method.")
        # In front of all others: what they see of the inputs is the batch the model runs.
        before = opened.model.register_forward_pre_hook(self._multiply, with_kwargs=True, prepend=True)
        after = opened.model.register_forward_hook(self._merge)
        try:
            # Several long rows in one batch: their activations are of a size that would be fetched anew in every layer.
            with kept() if opened.device.type == "cpu" else nullcontext():
                yield
        finally:
            before.remove()
            after.remove()

    def logits(
        self, opened: Opened, batch: Mapping[str, Any]
    ) -> tuple[Float[Tensor, "batch query vocabulary"], Float[Tensor, "batch query copy"]]:
        """The mixed logits of one forward pass, and the copies' weights."""
        reason = self.lacks(opened)
        if reason is not None:
            raise HeadwiseError(f"logits: {self.name} needs {reason}; {opened.name} does not have that.")
        with attend(opened, edits=self.edits(opened)), torch.no_grad():
            return self.mixed(opened.model(**self.copies(batch)).logits)

    def copies(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Model inputs with every sample N times, one after the other."""
        ids = given.get("input_ids")
        ids = given.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, Tensor):
            raise HeadwiseError('AttentionBuckets: wanted model inputs with "input_ids" or "inputs_embeds".')
        if given.get("labels") is not None:
            raise HeadwiseError("AttentionBuckets: labels= would give the loss of the copies; take it of the logits.")

        def many(x: Any) -> Any:
            if isinstance(x, Carrier):
                return x.repeated(len(self.ratios))
            if isinstance(x, dict):
                return {kind: many(mask) for kind, mask in x.items()}
            of_samples = isinstance(x, Tensor) and x.ndim > 1 and len(x) == len(ids)
            return x.repeat_interleave(len(self.ratios), 0) if of_samples else x

        return {name: many(x) for name, x in given.items()}

    def mixed(
        self, logits: Float[Tensor, "batch_copy query vocabulary"]
    ) -> tuple[Float[Tensor, "batch query vocabulary"], Float[Tensor, "batch query copy"]]:
        """One prediction of the copies', and their weights, in single precision at least."""
        z = logits.to(torch.promote_types(logits.dtype, torch.float32)).unflatten(0, (-1, len(self.ratios)))
        weights = CONFIDENCE[self.confidence](z).softmax(1)
        if self.mix == "logits":
            out = (weights[..., None] * z).sum(1)
        else:
            out = (weights[..., None] * z.softmax(-1)).sum(1).log()
        return out.to(logits.dtype), weights.transpose(1, 2)

    def _multiply(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = self.copies(dict(zip(signature(model.forward).parameters, args, strict=False)) | kwargs)
        cache = given.get("past_key_values")
        if cache is not None:
            follow(cache, len(self.ratios), len(given.get("input_ids", given.get("inputs_embeds"))))
        return (), given

    def _merge(self, model: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # as `return_dict=False` wants it
            return self.mixed(output[0])[0], *output[1:]
        output.logits = self.mixed(output.logits)[0]
        return output


def text_rotary(opened: Opened) -> Rotary | None:
    """How the text layers turn queries and keys; None where they are not rotary."""
    site = next((site for site in opened.sites if site.stream == "text"), None)
    return None if site is None else find_rotary(opened.model, site.module)


def follow(cache: Any, copies: int, rows: int) -> None:
    """Checks that a cache holds the copies of every sample, and lets them follow where a beam search moves it."""
    filled = [layer.keys for layer in cache.layers if layer.get_seq_length()]
    if filled and len(filled[0]) != rows:
        raise HeadwiseError(
            f"AttentionBuckets: the cache holds {len(filled[0])} rows, not {rows}: begin with an empty one under apply."
        )
    if "reorder_cache" not in vars(cache):
        cache.reorder_cache = partial(reordered, cache.reorder_cache, copies)


def reordered(move: Callable[[Tensor], None], copies: int, rows: Tensor) -> None:
    move((rows[:, None] * copies + torch.arange(copies, device=rows.device)).flatten())
