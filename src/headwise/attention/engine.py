"""Lowers one call to the cheapest path that is exact for it, and can say which and why.

- library: PyTorch's own attention, where only the output is wanted and no edit needs the weights
- dense:   the whole matrix, for small calls and where gradients must flow through an edited call
- stream:  blocks of queries and keys, for the rest
- fused:   one Triton kernel, on CUDA (fused_path.py)
- rows:    the dense way in blocks of rows, for calls with a form of their own (form.py); kernel: the form's own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention.by_rows import by_rows
from headwise.attention.call import AttentionCall
from headwise.attention.dense import Matrix, Values, dense, weighed
from headwise.attention.dense import read as read_off
from headwise.attention.edits import Edit
from headwise.attention.effects import Effects, finish, resolve
from headwise.attention.mask import Mask
from headwise.attention.once import on
from headwise.attention.readings import HeadOutput, Inputs, Reading
from headwise.attention.stream import stream
from headwise.errors import HeadwiseError

Path = Callable[[Effects, Sequence[Reading], bool], tuple[Tensor | None, dict[Reading, Values]]]

DENSE_PLACES = 2**14
"""Up to so many query-key pairs a head, the whole matrix is quicker than blocks (measured, 2 CPU cores)."""
MASK_PLACES = 2**22
"""Up to so many entries, a mask tensor may be built for PyTorch's own attention."""

_forced: ContextVar[str | None] = ContextVar("headwise_path", default=None)


@contextmanager
def force_path(path: str) -> Iterator[None]:
    """Every call inside takes this path ("dense", "stream" or "fused"): for tests and for finding a fault."""
    if path not in PATHS:
        raise HeadwiseError(f"force_path wants one of {', '.join(PATHS)}; got {path!r}.")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_path() -> str | None:
    """The path `force_path` asks for."""
    return _forced.get()


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


@dataclass(frozen=True)
class Part:
    """A reading, for the rows (places in the call, on the CPU) and heads it wants of this call; None = all."""

    reading: Reading
    rows: Tensor | None = None
    heads: tuple[int, ...] | None = None

    @property
    def where(self) -> tuple:
        """Equal for parts that can be read together: readings that ask for the same rows share the tensor."""
        return None if self.rows is None else id(self.rows), self.heads


@dataclass
class Result:
    out: Float[Tensor, "batch heads query value_dim"]
    values: list[Values]
    path: str
    reason: str


def run_call(call: AttentionCall, edits: Sequence[tuple[Edit, list[int]]], parts: Sequence[Part]) -> Result:
    """The output of an edited call, and for every part its values [batch, heads wanted, rows wanted, ...]."""
    effects = resolve(call, edits)
    call = effects.call
    weights = [p for p in parts if not isinstance(p.reading, (HeadOutput, Inputs))]
    whole = [p for p in weights if p.where == (None, None)]
    path, reason = choose(effects, bool(whole))
    values: dict[int, Values] = {}
    with torch.set_grad_enabled(torch.is_grad_enabled() and path in ("library", "dense", "kernel")):
        out, read = PATHS[path](effects, [p.reading.key() for p in whole] if path != "library" else [], True)
    assert out is not None
    if whole and path == "library":
        with torch.no_grad():
            _, read = stream(effects, unique(whole), output=False)
    values.update({id(p): read[p.reading.key()] for p in whole})
    with torch.no_grad():
        values.update(partial(effects, [p for p in weights if p.where != (None, None)]))
    out = finish(effects, out.to(call.v.dtype), uniform)
    with torch.no_grad():
        values.update({id(p): plain(p, call, out) for p in parts if isinstance(p.reading, (HeadOutput, Inputs))})
    return Result(out, [values[id(p)] for p in parts], path, reason)


def unique(parts: Sequence[Part]) -> list[Reading]:
    return list(dict.fromkeys(p.reading.key() for p in parts))


def partial(effects: Effects, parts: Sequence[Part]) -> dict[int, Values]:
    """Readings of some rows or heads: each selection is a call of its own, without the output."""
    found: dict[int, Values] = {}
    whole: Matrix | None = None
    for where in dict.fromkeys(p.where for p in parts):
        mine = [p for p in parts if p.where == where]
        rows, heads = mine[0].rows, None if mine[0].heads is None else list(mine[0].heads)
        if rows is not None and not len(rows):
            continue
        if not effects.call.local:
            # Weights that need other rows or heads are made for all of them, once.
            whole = whole or weighed(effects)
            small = whole.select(rows, heads)
            values = {reading: read_off(reading, small) for reading in unique(mine)}
            found.update({id(p): values[p.reading.key()] for p in mine})
            continue
        smaller = effects.select(effects.call.select(rows, heads), rows, heads)
        name, _ = choose(smaller, True)
        path = PATHS["stream" if name == "library" else name]
        _, values = path(smaller, unique(mine), False)
        found.update({id(p): values[p.reading.key()] for p in mine})
    return {id(p): found.get(id(p), {}) for p in parts}


def choose(effects: Effects, reads_all: bool) -> tuple[str, str]:
    """The path for a call, and the reason in words."""
    call = effects.call
    if call.form is not None:
        return choose_formed(effects, reads_all)
    forced = forced_path()
    if forced is not None:
        return forced, "asked for by force_path"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        if library_can(effects):
            return "library", "gradients flow through PyTorch's own attention; readings are taken beside it"
        return "dense", "gradients must flow through an edited call"
    if not reads_all and library_can(effects):
        return "library", "only the output is needed"
    if call.q.is_cuda:
        fits, why = fused_can(effects)
        if fits:
            return "fused", "one kernel for the output and its statistics"
        if call.queries * call.keys > DENSE_PLACES:
            return "stream", f"blocks of queries and keys: {why}"
    if call.queries * call.keys <= DENSE_PLACES:
        return "dense", f"{call.queries} x {call.keys} is small"
    return "stream", "blocks of queries and keys, no n x n matrix"


def choose_formed(effects: Effects, reads_all: bool) -> tuple[str, str]:
    """The path for a call whose weights are made in a form of its own."""
    call, form = effects.call, effects.call.form
    assert form is not None
    name = type(form).__name__
    if not reads_all and not effects.changes_scores and form.has_kernel(call):
        return "kernel", f"{name} has a kernel for this call"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return "dense", f"gradients must flow through {name}"
    if not form.local:
        return "dense", f"{name} mixes rows or heads: the whole matrix"
    if call.queries * call.keys <= DENSE_PLACES:
        return "dense", f"{call.queries} x {call.keys} is small"
    return "rows", f"blocks of rows: {name} makes its own weights"


def kernel(effects: Effects, readings: Sequence[Reading], output: bool) -> tuple[Tensor, dict[Reading, Values]]:
    """The output by the form's own kernel."""
    form = effects.call.form
    assert form is not None
    return form.kernel(effects.call), {}


def fused_can(effects: Effects) -> tuple[bool, str]:
    """Whether the Triton kernels can do this call, and if not, why."""
    if not has_triton():
        return False, "the fused kernels need triton, which is not installed"
    from headwise.attention.fused_path import fusable

    return fusable(effects)


def fused(effects: Effects, readings: Sequence[Reading], output: bool) -> tuple[Tensor | None, dict[Reading, Values]]:
    # Imported here: triton is not installed everywhere.
    from headwise.attention.fused_path import fused as attend

    device = effects.call.q.device
    # Triton launches on the current device, a model may be spread over several.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return attend(effects, readings, output)


def library_can(effects: Effects) -> bool:
    """Whether PyTorch's attention gives this call's output exactly, without a large mask."""
    call = effects.call
    if effects.maps or effects.weighs or any(x is not None for x in (call.softcap, call.sinks, call.form)):
        return False
    if not effects.biases and call.bias is None and library_form(call) is not None:
        return True
    per_head = bool(effects.biases) or call.bias is not None
    return call.batch * call.queries * call.keys * (call.heads if per_head else 1) <= MASK_PLACES


def library_form(call: AttentionCall) -> str | None:
    """ "causal" or "full" where no mask tensor is needed."""
    mask = call.mask
    if any(x is not None for x in (mask.left, mask.key_valid, mask.rule, mask.allowed, mask.added, mask.indices)):
        return None
    if mask.right is None or (call.queries == 1 and call.j0 + call.keys - 1 <= call.first + mask.right):
        return "full"
    square = mask.right == 0 and call.queries == call.keys and call.first == call.j0
    return "causal" if square else None


def library(effects: Effects, readings: Sequence[Reading], output: bool) -> tuple[Tensor, dict[Reading, Values]]:
    """PyTorch's own attention; edits that are score biases ride in its mask."""
    call = effects.call
    form = library_form(call)
    mask, cut = None, None
    if form is None or effects.biases or call.bias is not None:
        form = None
        seen = call.mask.dense(call.i, call.j0, call.keys)
        mask, cut = bias_matrix(effects)
        if mask is None:
            # A row that sees nothing would be nan: let it see all, nobody reads it.
            mask = seen | ~seen.any(-1, keepdim=True)
        else:
            hidden = ~seen if cut is None else ~seen | cut
            mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    out = torch.nn.functional.scaled_dot_product_attention(
        call.q,
        call.k,
        call.v,
        attn_mask=mask,
        is_causal=form == "causal",
        scale=call.scale,
        enable_gqa=call.group > 1,
    )
    if cut is not None:
        # A row whose every key was knocked out attends to nothing.
        out = out.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return out, {}


def bias_matrix(effects: Effects) -> tuple[Tensor | None, Tensor | None]:
    """Position bias, additive mask and ScoreBias edits as one tensor, and the keys that biases of -inf knock out; None
    where there are none."""
    call = effects.call
    terms = [x.to(call.q.dtype) for x in (call.bias, call.mask.added) if x is not None]
    total: Tensor | None = sum(terms[1:], terms[0]) if terms else None
    if not effects.biases:
        return total, None
    shape = (call.batch, call.heads, call.queries, call.keys)
    total = call.q.new_zeros(shape) if total is None else total.expand(shape).clone()
    low = torch.finfo(total.dtype).min / 4
    cut = torch.zeros(shape, dtype=torch.bool, device=total.device) if any(b.cuts for b in effects.biases) else None
    for bias in effects.biases:
        step = torch.as_tensor(bias.value, dtype=total.dtype, device=total.device)
        step = step if bias.vector is None else step * bias.vector.to(total)
        chosen = torch.ones((), dtype=torch.bool, device=total.device)
        if bias.keys is not None:
            chosen = chosen & bias.keys.block(call.i, call.j0, 0, call.keys)
        if bias.queries is not None:
            chosen = chosen & bias.queries[:, None, :, None]
        if cut is not None and bias.cuts:
            cut[:, bias.heads] |= chosen & (step == -torch.inf)
        total[:, bias.heads] = total[:, bias.heads] + torch.where(chosen, step.clamp(min=low), 0.0)
    return total, cut


def uniform(call: AttentionCall) -> Tensor:
    """Equal weights on all keys a query sees: the same call with all scores 0."""
    mask: Mask = replace(call.mask, added=None)
    if call.mask.added is not None:
        seen = call.mask.added > -1e29
        mask.allowed = seen if mask.allowed is None else mask.allowed & seen
    flat = replace(call, q=torch.zeros_like(call.q), softcap=None, sinks=None, bias=None, mask=mask, form=None)
    path, _ = choose(Effects(flat), False)
    out, _ = PATHS[path](Effects(flat), [], True)
    assert out is not None
    return out


def plain(part: Part, call: AttentionCall, out: Tensor) -> Values:
    """Readings that are no reduction of the weights: outputs and inputs."""
    if isinstance(part.reading, HeadOutput):
        z = _pick(out, part)
        if part.reading.what == "vector":
            return {"head_output": z}
        if part.reading.what == "norm":
            return {"head_output_norm": z.norm(dim=-1)}
        assert call.site is not None
        heads = list(range(call.heads)) if part.heads is None else list(part.heads)
        w = call.site.W_O
        norms = [(z[:, n].to(w.dtype) @ w[call.head_ids[h]]).norm(dim=-1) for n, h in enumerate(heads)]  # type: ignore[index]
        return {"residual_norm": torch.stack(norms, 1)}
    values: Values = {}
    new = call.i - call.j0
    for what in part.reading.what:  # type: ignore[attr-defined]
        if what == "q":
            values["input_q"] = _pick(call.q, part)
            continue
        x = call.k if what == "k" else call.v
        if call.site is None or call.site.kind == "self":
            x = x[:, :, new[(new >= 0) & (new < call.keys)]]
        x = x.repeat_interleave(call.group, 1)
        values[f"input_{what}"] = _pick(
            x, Part(part.reading, part.rows if x.shape[2] == call.queries else None, part.heads)
        )
    return values


def _pick(x: Tensor, part: Part) -> Tensor:
    x = x if part.heads is None else x[:, list(part.heads)]
    return x if part.rows is None else x[:, :, on(part.rows, x.device)]


PATHS: dict[str, Path] = {
    "library": library,
    "dense": lambda effects, readings, output: dense(effects, readings),
    "stream": stream,
    "fused": fused,
    "rows": by_rows,
    "kernel": kernel,
}
