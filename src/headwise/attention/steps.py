"""Decoding: one new token a sample against a cache, with all that stays the same from token to token worked out once.

The first token of a site goes the general way (`seam.Session.call`). Where nothing but the output is wanted of it, a
`Step` made from that call does the following ones: it looks up no name and no segment, makes no table and waits for no
device. A call that is not like the first goes the general way again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.attention.call import AttentionCall
from headwise.attention.edits import Edit
from headwise.attention.effects import Effects
from headwise.attention.engine import forced_path, has_triton, library_can, library_form
from headwise.attention.incoming import Frame, Seen
from headwise.attention.label_table import LabelTable
from headwise.attention.library_step import library_step
from headwise.attention.scratch import Scratch

Run = Callable[[Tensor, Tensor, Tensor, Seen], Tensor | None]


@dataclass
class Step:
    """A way to compute the output [batch, 1, heads, value_dim], and what a call must be like to go it."""

    run: Run
    path: str
    reason: str
    shape: torch.Size
    kv: tuple[int, int, int]
    value_dim: int
    dtype: torch.dtype
    device: int
    given: tuple[Any, Any, Any]
    """scaling, softcap and sinks, as the model hands them over."""
    forced: str | None

    def __call__(
        self, frame: Frame, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The heads' outputs; None where this is another kind of call than the step was made for."""
        if not frame.past or not self.fits(q, k, v, kwargs):
            return None
        seen = frame.seen(mask)
        return None if seen is None else self.run(q, k, v, seen)

    def fits(self, q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> bool:
        (scaling, softcap, sinks), get, keys = self.given, kwargs.get, k.shape
        return (
            q.shape == self.shape
            and (keys[0], keys[1], keys[3]) == self.kv
            and v.shape[3] == self.value_dim
            and q.dtype is self.dtype
            and k.dtype is self.dtype
            and v.dtype is self.dtype
            and q.get_device() == self.device
            and get("scaling") == scaling
            and get("softcap") == softcap
            and get("s_aux") is sinks
            and get("position_bias") is None
            and get("indices") is None
            and get("cache") is None
            and not get("dropout")
            and forced_path() == self.forced
            and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        )


@dataclass
class Planner:
    """The steps of one session. Sites that differ in nothing a step knows share one: what 32 layers use stays in the
    processor's caches, what each has for itself does not."""

    scratch: Scratch = field(default_factory=Scratch)
    made: dict[tuple, Step | None] = field(default_factory=dict)

    def plan(
        self, call: AttentionCall, edits: Sequence[tuple[Edit, list[int]]], kwargs: dict[str, Any], known: LabelTable
    ) -> Step | None:
        """A step for calls like this one, which went the general way; None where there is no quicker one."""
        if call.queries != 1 or call.site is None or call.site.kind != "self" or kwargs.get("cache") is not None:
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
            return None
        forced, form, sinks = forced_path(), library_form(call), call.sinks
        given, what = (kwargs.get("scaling"), kwargs.get("softcap"), sinks), [(id(e), *heads) for e, heads in edits]
        q, kv = call.q, (call.batch, call.k.shape[1], call.k.shape[3])
        # Edits, tables and sinks live as long as the session's runs, so their ids are theirs.
        key = (
            forced, form, call.bias is None, id(known), q.shape, kv, call.v.shape[3], q.dtype, q.get_device(),
            call.scale, *given[:2], id(sinks), *what,
        )  # fmt: skip
        if key not in self.made:
            run, path, reason = self._run(call, edits, known, forced, form)
            self.made[key] = None
            if run is not None:
                self.made[key] = Step(
                    run, path, reason, q.shape, kv, call.v.shape[3], q.dtype, q.get_device(), given, forced
                )
        return self.made[key]

    def _run(
        self, call: AttentionCall, edits: Sequence[tuple[Edit, list[int]]], known: LabelTable, forced: str | None,
        form: str | None,
    ) -> tuple[Run | None, str, str]:  # fmt: skip
        if not edits and forced in (None, "library") and form == "full" and library_can(Effects(call)):
            return library_run(call), "library", "only the output is needed"
        if has_triton() and (forced == "fused" or (forced is None and call.q.is_cuda)):
            # Imported here: triton is not installed everywhere.
            from headwise.attention.fused_step import fused_step

            step = fused_step(call, edits, known, self.scratch)
            if step is not None:
                return step.run, "fused", "one token at a time: tables made once, one pass over the keys"
        rows = library_step(call, edits, known) if forced is None else None
        if rows is not None:
            return rows.run, "library", "one token at a time: biases and gains worked out once, in PyTorch's attention"
        return None, "", ""


def library_run(call: AttentionCall) -> Run:
    """PyTorch's own attention, where no edit is for the site."""
    scale, grouped = call.scale, call.group > 1

    def run(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor | None:
        position, _, left, right, valid = seen
        if valid is not None or left is not None or (right is not None and k.shape[2] > position + right + 1):
            return None
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous()

    return run
