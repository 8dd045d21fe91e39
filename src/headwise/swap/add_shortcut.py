"""A layerwise attention shortcut in a trained decoder, fed by hooks on its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from headwise.errors import HeadwiseError
from headwise.models.anatomy import find_sites
from headwise.models.open import Opened
from headwise.swap.adapter import Replacement, arguments_of, refuse
from headwise.swap.convert import set_module
from headwise.swap.layer_shortcut import LayerShortcutAttention
from headwise.swap.probe import position_of
from headwise.swap.upscale import first_norm, layers_of


class Gathered(Replacement):
    """The shortcut in its host: what it is called with is replaced by the states of the layers before."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.states: list[Tensor] = []

    def collect(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        """A hook on layer `number`. What a forward that broke off has left behind it goes."""

        def hook(_layer: nn.Module, _args: Any, out: Any) -> None:
            self.states[number:] = [out[0] if isinstance(out, tuple) else out]

        return hook

    def forward(self, *args: Any, **named: Any) -> tuple[Tensor, None]:
        given = {**dict(zip(self.arguments, args, strict=False)), **named}
        states = torch.stack(self.states, 2)
        self.states.clear()
        return super().forward(**{**given, self.arguments[0]: states})

    def added(self, layer: nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A hook in front of the last layer."""
        named = {**dict(zip(arguments_of(layer), args, strict=False)), **given}
        x = named.pop("hidden_states")
        return (), {"hidden_states": x + self(x, **named)[0], **named}


@dataclass
class Shortcut:
    """A model with a shortcut. As a context manager it takes it out at the end."""

    model: nn.Module = field(repr=False)
    attention: LayerShortcutAttention
    _layer: nn.Module = field(repr=False)
    _site: tuple[str, nn.Module] | None = field(repr=False)
    _hooks: list[RemovableHandle] = field(repr=False)

    def undo(self) -> None:
        """The model as it was."""
        for hook in self._hooks:
            hook.remove()
        if self._site is None:
            del self._layer.shortcut
        else:
            set_module(self.model, *self._site)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()

    @torch.no_grad()
    def depth_usage(self, **inputs: Any) -> Float[Tensor, "batch heads token depth"]:
        """One forward of the model: the attention of every head and token to each depth."""
        found: list[Tensor] = []

        def look(module: nn.Module, args: tuple, given: dict[str, Any]) -> None:
            found.append(self.attention.depth_usage(args[0], given["mask"], given["positions"]))

        hook = self.attention.register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.model(**{**inputs, "use_cache": False})
        finally:
            hook.remove()
        return found[0]


def add_shortcut(
    model: Opened | nn.Module,
    depths: Sequence[int] | None = None,
    mode: Literal["add", "replace"] = "add",
    zero_init: bool = True,
    **own: Any,
) -> Shortcut:
    """Lets the last layer of a trained decoder read the outputs of all layers before it, in place.

    `depths`: layers, numbers from 0, the last one excluded (None: all). `mode`: "add" puts a LayerShortcutAttention
    with a residual in front of the last layer, whose output starts at zero (`zero_init`), so that the model is what it
    was; "replace" puts it in the place of the last layer's attention, and the output is another, unless the only depth
    is the layer before and `map` "identity". It starts with the last layer's projections and norm; `own` is what a
    LayerShortcutAttention is made with (map, same_position, depth_embedding). Caches and generation work.
    """
    inner = model.model if isinstance(model, Opened) else model
    if mode not in ("add", "replace"):
        raise HeadwiseError(f"add_shortcut: mode is 'add' or 'replace'; got {mode!r}.")
    sites = [site for site in find_sites(inner) if site.kind == "self"]
    layers = layers_of(inner, sites)
    reason = refuse(sites[-1]) if len(layers) > 1 else "there is no layer before it"
    position = None if reason else position_of(sites[-1])
    if reason is None and position is None:
        reason = "attention by its weights alone gives another output than it does"
    if reason is not None:
        raise HeadwiseError(f"add_shortcut: {sites[-1].name} can't have one: {reason}.")
    chosen = list(range(len(layers) - 1)) if depths is None else list(depths)
    if not chosen or not 0 <= min(chosen) <= max(chosen) < len(layers) - 1:
        raise HeadwiseError(f"add_shortcut: depths wants numbers from 0 to {len(layers) - 2}; got {chosen}.")
    last, site = layers[-1], sites[-1]
    made = LayerShortcutAttention.from_site(site, True, depths=chosen, **{"position": position, **own})
    norm = first_norm(last)
    made.norm = copy.deepcopy(norm)
    made.norms = nn.ModuleList(copy.deepcopy(norm) for _ in chosen)
    made.train(last.training)
    gathered = Gathered(made, site)
    hooks = [layer.register_forward_hook(gathered.collect(n)) for n, layer in enumerate(list(layers)[:-1])]
    if mode == "replace":
        set_module(inner, site.name, gathered)
        return Shortcut(inner, made, last, (site.name, site.module), hooks)
    if zero_init:
        for parameter in made.o_proj.parameters():
            nn.init.zeros_(parameter)
    gathered.layer_idx = len(layers)  # a place of its own in caches
    last.shortcut = gathered
    hooks.append(last.register_forward_pre_hook(gathered.added, with_kwargs=True))
    return Shortcut(inner, made, last, None, hooks)
