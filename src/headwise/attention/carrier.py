"""The mask a model is given while we look on: a 4-D tensor of one byte that carries the rule it stands for.

transformers asks for a mask once per forward and passes it down untouched; so a tensor without storage will do. Code
that does arithmetic on it gets the real mask, in the form its own back end would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.attention.mask import Mask

LOOK = {"__get__", "dim", "size", "numel", "is_floating_point", "stride", "storage_offset", "is_contiguous", "__len__"}
KEEP = {"to", "detach", "contiguous", "requires_grad_"}


@dataclass
class Spec:
    """What a model asked for: a mask between positions, and how to build it for real."""

    mask: Mask
    offset: int
    j0: int
    build: Callable[[], Tensor]
    padding: Tensor | None = None
    """[batch, position] bool: which positions hold tokens."""
    built: Tensor | None = None

    def real(self) -> Tensor:
        if self.built is None:
            self.built = self.build()
        return self.built


class Carrier(torch.Tensor):
    """`[batch, 1, query, key]` without storage; `.spec` says what it stands for."""

    spec: Spec

    @staticmethod
    def of(spec: Spec, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Carrier:
        empty = torch.empty((), dtype=dtype, device=device).expand(shape)
        carrier = torch.Tensor._make_subclass(Carrier, empty)
        carrier.spec = spec
        return carrier

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in LOOK:
                return func(*args, **(kwargs or {}))
            if name in KEEP and isinstance(args[0], Carrier):
                return args[0]
            if name == "__getitem__" and isinstance(args[0], Carrier):
                kept = _cropped(args[0], args[1])
                if kept is not None:
                    return kept
            args = torch.utils._pytree.tree_map_only(Carrier, lambda c: c.spec.real(), args)
            kwargs = torch.utils._pytree.tree_map_only(Carrier, lambda c: c.spec.real(), kwargs or {})
            return func(*args, **kwargs)

    def repeated(self, times: int) -> Carrier:
        """The mask of a batch that holds every sample so many times, one after the other."""
        spec, rule = self.spec, self.spec.mask.rule

        def many(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat_interleave(times, 0)

        mask = replace(spec.mask, key_valid=many(spec.mask.key_valid), batch=times * spec.mask.batch, _cache={})
        if rule is not None:
            mask.rule = lambda b, h, i, j: rule(b // times, h, i, j)
        larger = Spec(mask, spec.offset, spec.j0, lambda: spec.real().repeat_interleave(times, 0), many(spec.padding))
        return Carrier.of(larger, (times * self.shape[0], *self.shape[1:]), self.device, self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"Carrier({tuple(self.shape)}, {self.spec.mask})"


def _cropped(carrier: Carrier, index: Any) -> Carrier | None:
    """mask[:, :, a:b, :n]: the same rule for some of the queries and the first n keys; None for any other index."""
    if not isinstance(index, tuple) or len(index) > 4:
        return None
    if not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        return None
    shape = tuple(carrier.shape)
    spans = [i.indices(size)[:2] for i, size in zip(index, shape, strict=False)]
    if any(start for n, (start, _) in enumerate(spans) if n != 2):
        return None
    if any(stop != size for (_, stop), size in zip(spans[:2], shape, strict=False)):
        return None
    smaller = (*(stop - start for start, stop in spans), *shape[len(spans) :])
    if smaller == shape:
        return carrier
    spec = carrier.spec
    first = spans[2][0] if len(spans) > 2 else 0
    part = Spec(spec.mask, spec.offset + first, spec.j0, lambda: spec.real()[index], spec.padding)
    return Carrier.of(part, smaller, carrier.device, carrier.dtype)


def known_rule(function: Any) -> Mask | None:
    """The plain masks of transformers, recognised as themselves; None for any other rule."""
    from transformers import masking_utils as m

    if function is m.causal_mask_function:
        return Mask(right=0)
    if function is m.bidirectional_mask_function:
        return Mask()
    name = getattr(function, "__qualname__", "")
    cells = dict(
        zip(getattr(getattr(function, "__code__", None), "co_freevars", ()), function.__closure__ or (), strict=False)
    )
    if name == "and_masks.<locals>.and_mask":
        parts = [known_rule(f) for f in cells["mask_functions"].cell_contents]
        if any(p is None for p in parts):
            return None
        lefts = [p.left for p in parts if p is not None and p.left is not None]
        rights = [p.right for p in parts if p is not None and p.right is not None]
        return Mask(left=min(lefts, default=None), right=min(rights, default=None))
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return Mask(left=int(cells["sliding_window"].cell_contents) - 1)
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        width = int(cells["sliding_window"].cell_contents)
        return Mask(left=width, right=width)
    return None


def carry(original: str, **asked: Any) -> Carrier:
    """The mask function registered with transformers: same arguments, `original` = the model's own back end."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, prepare_padding_mask

    batch, queries, keys = asked["batch_size"], int(asked["q_length"]), int(asked["kv_length"])
    # A static cache's offset is a live tensor that grows under our hands: read it now.
    offset, j0 = int(asked.get("q_offset", 0)), int(asked.get("kv_offset", 0))
    asked["q_offset"], asked["kv_offset"] = offset, j0
    device = torch.device(asked.get("device", "cpu"))
    padding = asked.get("attention_mask")
    rule = asked["mask_function"]
    mask = known_rule(rule) or Mask(rule=rule, vmap=bool(asked.get("use_vmap", False)))
    mask.batch = batch
    if padding is not None:
        padding = padding.to(device=device, dtype=torch.bool)
        full = prepare_padding_mask(padding, keys, j0)
        if full is not None and not bool(full[:, j0 : j0 + keys].all()):
            mask.key_valid = full[:, j0 : j0 + keys]

    # The carrier claims the dtype that the real mask will have when code touches it.
    dtype = asked.get("dtype", torch.float32) if original == "eager" else torch.bool

    def build() -> Tensor:
        known = ALL_MASK_ATTENTION_FUNCTIONS
        function = known[original if original in ("sdpa", "eager") else "sdpa"]
        return function(**{**asked, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    return Carrier.of(Spec(mask, offset, j0, build, padding), (batch, 1, queries, keys), device, dtype)
