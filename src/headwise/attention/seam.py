"""How we get in, and out again: transformers' attention registry, and a function mode for the rest.

A `Session` is attached to one model while at least one `attend` is open on it. Every attention call of the model comes
to `Session.call`, which asks the open runs for their readings and edits and the engine for the result.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from headwise.attention.call import AttentionCall
from headwise.attention.carrier import Carrier, carry
from headwise.attention.function_mode import FunctionMode
from headwise.attention.incoming import Frame, describe, past_length
from headwise.attention.recompute import run_rows
from headwise.attention.steps import Planner, Step
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site, attention_kind, find_sites, guess_stream

if TYPE_CHECKING:
    from headwise.attention.run import Run

NAME = "headwise"
"""The registered name: none of transformers' own substrings (sdpa, flash, flex_attention) may be in it."""

ENTERED = ("scaled_dot_product_attention", "multi_head_attention_forward", "dispatch_attention_fn", "attended(")
"""What a function mode sees, or leads to it."""
_sessions: dict[nn.Module, Session] = {}
"""Every module of an attached model -> its session, while it is attached."""
_originals: dict[int, str] = {}
"""id(config) -> the back end it named before we came."""
PADDED = ("text", "encoder")
"""Streams whose tokens the model's own `attention_mask` argument is about."""


class Session:
    """One attached model: its sites, the open runs, and the forward under way."""

    def __init__(self, model: nn.Module, sites: list[Site] | None = None):
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.sites = sites if sites is not None else find_sites(model)
        self.by_module = {site.module: site for site in self.sites}
        self.how = {site.name: entrance(site.module) for site in self.sites}
        self.runs: list[Run] = []
        self.frame: Frame | None = None
        self.steps: dict[nn.Module, Step] = {}
        self.planner = Planner()
        self.busy = False
        self.taken: list[tuple[Tensor, Tensor, Tensor]] | None = None
        """Where what a module would attend with is put instead of attending (see `attention_inputs`)."""
        self.depth = 0
        self.stack: list[nn.Module] = []
        self.ran: set[str] = set()
        self.reached: dict[str, str] = {}
        self.refused: dict[str, str] = {}

    def site_of(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Site:
        """The site of a calling module; one nobody foresaw is added, and said to be so in the report."""
        site = self.by_module.get(module)
        if site is None:
            name = self.names.get(module, type(module).__name__)
            near = [s for s in self.sites if s.name.startswith(name + ".") or name.startswith(s.name + ".")]
            if len(near) == 1:
                site = near[0]
            else:
                kind = attention_kind(module, name)
                stream = guess_stream(self.model, name, kind)
                layer = sum(s.stream == stream for s in self.sites)
                site = Site.from_call(
                    module, name, stream, layer, q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], kind
                )
                self.sites.append(site)
                self.how[name] = "found by its call"
            self.by_module[module] = site
        return site

    def kind_of(self, module: nn.Module) -> str:
        """Whether a module attends to its own sequence ("self") or to another ("cross")."""
        site = self.by_module.get(module)
        return site.kind if site is not None else attention_kind(module, self.names.get(module, ""))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Everything that touches the model, undone in the reverse order whatever happens."""
        with ExitStack() as stack:
            for module in self.names:
                if module in _sessions:
                    raise HeadwiseError("This model is part of a larger one that is under attend: attend to that one.")
            stack.enter_context(uncompiled(self.model))
            for module in self.names:
                _sessions[module] = self
                stack.callback(_sessions.pop, module, None)
            ways = set(self.how.values())
            if "registry" in ways:
                stack.enter_context(named(self.model))
            stack.enter_context(self._hooks(every=ways != {"registry"}))
            if ways != {"registry"}:
                self.mode = stack.enter_context(FunctionMode(self))
            yield

    @contextmanager
    def _hooks(self, every: bool) -> Iterator[None]:
        """Frames at the model's entrances; who is calling, where the call itself doesn't say."""
        with ExitStack() as stack:
            entrances = {self.model, *self._encoders()}
            for module in entrances:
                stack.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            for module in self.names if every else ():
                stack.callback(module.register_forward_pre_hook(self._push).remove)
                stack.callback(module.register_forward_hook(self._pop, always_call=True).remove)
            for site in self.sites:
                stack.callback(self._watch(site).remove)
            yield

    def _watch(self, site: Site) -> RemovableHandle:
        """Notes that a site was run, once: a hook costs time at every call."""

        def saw(module: nn.Module, args: Any) -> None:
            self.ran.add(site.name)
            handle.remove()

        handle = site.module.register_forward_pre_hook(saw)
        return handle

    def _encoders(self) -> set[nn.Module]:
        """Sub-models that generate() calls by themselves, outside a forward of the whole."""
        getter = getattr(self.model, "get_encoder", None)
        try:
            encoder = getter() if getter is not None else None
        except (AttributeError, TypeError, KeyError):
            encoder = None
        return {encoder} if isinstance(encoder, nn.Module) and encoder in self.names else set()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.depth == 0:
            ids = kwargs.get("input_ids", args[0] if args else None)
            self.frame = Frame(past_length(kwargs), kwargs.get("attention_mask"), ids)
            for run in self.runs:
                run.begin()
        self.depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth = max(0, self.depth - 1)
        if self.depth == 0:
            self.frame = None

    def _push(self, module: nn.Module, args: Any) -> None:
        self.stack.append(module)

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        while self.stack and self.stack.pop() is not module:
            pass

    def owner(self) -> nn.Module:
        """The innermost module under way that is an attention site, else the innermost of all."""
        for module in reversed(self.stack):
            if module in self.by_module:
                return module
        return self.stack[-1] if self.stack else self.model

    def call(
        self, call: AttentionCall, module: nn.Module, how: str, given: dict[str, Any] | None = None
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """One attention call through all open runs. `given`: what a model hands over with every call of a site, where
        the next one may be a `Step`."""
        if self.taken is not None:
            return self.take(call.q, call.k, call.v)
        site = call.site = self.site_of(module, call.q, call.k, call.v)
        frame = self.frame or Frame(0)
        outer, inner = frame.calls[site.name, False], frame.calls[site.name, True]
        frame.calls[site.name, call.inner] += 1
        if call.query_valid is None and frame.padding is not None and site.kind == "self" and site.stream in PADDED:
            # The mask came as plain numbers: what the model was called with still tells tokens from padding.
            call.query_valid = frame.valid(frame.padding, call.first, call.queries, call.batch)
        asked = [run.ask(call, site, outer + inner * run.inner, frame) for run in self.runs]
        edits = [pair for ask in asked for pair in ask.edits]
        parts = [part for ask in asked for part in ask.parts]
        for ask in asked:
            if ask.labels is not None:
                call.labels = ask.labels
        result = run_rows(call, edits, parts)
        self.reached[site.name] = how
        position = 0
        for run, ask in zip(self.runs, asked, strict=True):
            run.take(ask, call, result, result.values[position : position + len(ask.parts)])
            position += len(ask.parts)
        if call.queries == 1 and frame.past and not parts and given is not None:
            self._plan(call, edits, module, given)
        return result.out

    def take(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps what a module would attend with, and gives it nothing."""
        assert self.taken is not None
        self.taken.append((q, k, v))
        return v.new_zeros(*q.shape[:3], v.shape[3])

    def _plan(self, call: AttentionCall, edits: list, module: nn.Module, given: dict[str, Any]) -> None:
        """The next tokens of this site can go a quicker way, if there is one."""
        assert call.site is not None
        known = self.runs[-1].known(call.site.stream, call.q.device)
        step = self.planner.plan(call, edits, given, known)
        if step is not None:
            self.steps[module] = step
            for run in self.runs:
                run.paths[call.site.name] = (step.path, step.reason)

    def forget_steps(self) -> None:
        """After a run came or went: something else is wanted now."""
        self.steps.clear()
        self.planner.made.clear()


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Compiled code runs as it was written: it would go past us, and what we do can't be compiled. On a GPU generate()
    compiles by itself where the cache is static. Loading the compiler takes seconds, so a model on a CPU is left in
    peace where nothing was compiled before."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if on_cpu and "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def entrance(module: nn.Module) -> str:
    """How an attention module can be entered, judged by its source: "registry", "function-mode" or "none: why"."""
    processor = getattr(module, "processor", None)
    return _entrance(type(module), None if processor is None else type(processor))  # type: ignore[arg-type]


@cache
def _entrance(kind: type, processor: type | None) -> str:
    if issubclass(kind, nn.MultiheadAttention):
        return "function-mode"
    texts, classes = [], list(kind.__mro__[: kind.__mro__.index(nn.Module)])
    for cls in classes if processor is None else [*classes, processor]:
        try:
            texts.append(inspect.getsource(cls))
        except (OSError, TypeError):
            continue
    text = "\n".join(texts)
    if ".get_interface(" in text or "ALL_ATTENTION_FUNCTIONS[" in text:
        return "registry"
    if not text or any(name in text for name in ENTERED):
        return "function-mode"
    return f"none: {kind.__name__} multiplies its attention out by hand"


@contextmanager
def named(model: nn.Module) -> Iterator[None]:
    """All configs of the model name our back end; each gets its own name back."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, registered)
    AttentionMaskInterface.register(NAME, masked)
    own = getattr(sys.modules.get(type(model).__module__), "ALL_ATTENTION_FUNCTIONS", None)
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            _collect(config, configs)
    with ExitStack() as stack:
        for config in configs.values():
            before = config._attn_implementation_internal
            stack.callback(_restore, config, before, "_attn_implementation_internal" in vars(config))
            _originals[id(config)] = before or "sdpa"
            config._attn_implementation_internal = NAME
        if own is not None and NAME not in own:
            own[NAME] = registered
            stack.callback(own.pop, NAME, None)
        yield


def _collect(config: Any, found: dict[int, Any]) -> None:
    found[id(config)] = config
    for key in getattr(config, "sub_configs", {}):
        sub = getattr(config, key, None)
        if sub is not None and hasattr(sub, "_attn_implementation_internal") and id(sub) not in found:
            _collect(sub, found)


def _restore(config: Any, before: Any, own: bool) -> None:
    _originals.pop(id(config), None)
    if own:
        config._attn_implementation_internal = before
    else:
        vars(config).pop("_attn_implementation_internal", None)


def masked(*args: Any, **kwargs: Any) -> Carrier:
    """The mask function registered with transformers."""
    return carry(_originals.get(id(kwargs.get("config")), "sdpa"), **kwargs)


def registered(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function registered with transformers: [batch, heads, query, dim] in,
    [batch, query, heads, dim] out."""
    session = _sessions.get(module)
    if session is None:
        raise HeadwiseError(
            f"{type(module).__name__} was put into the model after attend began: enter attend again to reach it."
        )
    if session.taken is not None:
        return session.take(query, key, value).transpose(1, 2), None
    # PyTorch's attention may be called on the way: this call is not to be seen once more by the function mode.
    session.busy = True
    try:
        step, frame = session.steps.get(module), session.frame
        if step is not None and frame is not None:
            quick = step(frame, query, key, value, attention_mask, kwargs)
            if quick is not None:
                return quick, None
        out = general(session, module, query, key, value, attention_mask, kwargs)
    finally:
        session.busy = False
    return out.transpose(1, 2).contiguous(), None


def general(
    session: Session, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, given: Any, kwargs: dict[str, Any]
) -> Float[Tensor, "batch heads query value_dim"]:
    """A call of any kind, through all that the open runs want."""
    if kwargs.get("cache") is not None and hasattr(kwargs["cache"], "update"):
        key, value = kwargs["cache"].update(key, value, getattr(module, "layer_idx", 0), kwargs)
    if kwargs.get("dropout"):
        raise HeadwiseError(f"{session.names[module]} uses attention dropout: call model.eval() before attend.")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    cross = session.kind_of(module) == "cross"
    call = describe(session.frame or Frame(0), cross, bool(causal), query, key, value, given, kwargs)
    return session.call(call, module, "registry", kwargs)


def attention_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The new tokens' queries, keys and values a module would attend with, were it called so: projected, normed and
    rotated by itself, its cache left alone. Only for a module of a model under `attend`."""
    session = _sessions.get(module)
    if session is None:
        raise HeadwiseError(f"{type(module).__name__}: its queries and keys can only be had inside attend.")

    def uncached(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    session.taken = []
    try:
        module.forward(*map(uncached, args), **{name: uncached(value) for name, value in kwargs.items()})
        taken = session.taken
    finally:
        session.taken = None
    if len(taken) != 1:
        raise HeadwiseError(f"{session.names[module]} attends {len(taken)} times in a call, not once.")
    return taken[0]


_open: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


@contextmanager
def joined(model: nn.Module, run: Run, sites: list[Site] | None) -> Iterator[Session]:
    """The model's session with `run` among its open runs; made for the first one, taken off after the last."""
    session = _open.get(model)
    if session is not None:
        session.runs.append(run)
        session.forget_steps()
        try:
            yield session
        finally:
            session.runs.remove(run)
            session.forget_steps()
        return
    session = Session(model, sites)
    session.runs.append(run)
    with session.attached():
        _open[model] = session
        try:
            yield session
        finally:
            session.runs.remove(run)  # a run keeps its session: the session must not keep the run
            session.steps.clear()
            session.planner = Planner()
            _open.pop(model, None)
