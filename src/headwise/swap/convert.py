"""Puts a mechanism into a trained transformers model, and takes it out again; keeps such a model on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site, find_sites
from headwise.models.open import Opened
from headwise.swap.adapter import HostTurn, Replacement, refuse
from headwise.swap.catalogue import MECHANISMS
from headwise.swap.mechanism import Mechanism

FILE = "headwise_swap.json"
Layers = str | Sequence[int] | None


@dataclass
class Conversion:
    """A model some of whose layers were replaced. As a context manager it takes the mechanisms out at the end."""

    model: nn.Module = field(repr=False)
    mechanism: str
    own: dict[str, Any]
    mechanisms: dict[str, Mechanism] = field(repr=False)
    """By the name of the layer they stand for."""
    originals: dict[str, nn.Module] = field(repr=False)

    def undo(self) -> None:
        """The model as it was, with its own layers."""
        for name, module in self.originals.items():
            set_module(self.model, name, module)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()

    def save(self, folder: str | Path) -> None:
        """The whole model as transformers saves it (safetensors, JSON), and beside it what was put in where."""
        folder = Path(folder)
        self.model.save_pretrained(folder)  # type: ignore[operator]
        kept = {"mechanism": self.mechanism, "own": self.own, "layers": list(self.mechanisms)}
        try:
            text = json.dumps(kept, indent=2)
        except TypeError as error:
            raise HeadwiseError(f"save: {error}; give settings that JSON can hold.") from None
        (folder / FILE).write_text(text + "\n")


def convert(
    model: Opened | nn.Module, mechanism: str | type[Mechanism], layers: Layers = None, **own: Any
) -> Conversion:
    """Replaces attention layers by a mechanism that starts with their weights.

    `layers`: None for all, numbers from 0, or a layout by name: "all", "odd", "even", "25%", "first", "last",
    "bilateral" (counted from 1, as "Deconstructing Attention", arXiv 2510.11602, does), "every4" and so on. `own`:
    what the mechanism is made with beside its sizes. The model is changed in place until `undo()`.
    """
    inner = model.model if isinstance(model, Opened) else model
    cls = named(mechanism)
    sites = [site for site in find_sites(inner) if site.kind == "self"]
    streams = {site.stream for site in sites}
    stream = "text" if "text" in streams else next(iter(streams), None)
    sites = [site for site in sites if site.stream == stream]
    chosen = chosen_layers(layers, len(sites))
    for site in (sites[n] for n in chosen):
        reason = refuse(site)
        if reason is not None:
            raise HeadwiseError(f"convert: {site.name} ({type(site.module).__name__}) can't be replaced: {reason}.")
    conversion = Conversion(inner, cls.key(), own, {}, {})
    try:
        for site in (sites[n] for n in chosen):
            conversion.mechanisms[site.name] = replace(inner, site, cls, own)
            conversion.originals[site.name] = site.module
    except BaseException:
        conversion.undo()  # a layer that can't be made leaves no model that is half another
        raise
    return conversion


def replace(model: nn.Module, site: Site, cls: type[Mechanism], own: dict[str, Any]) -> Mechanism:
    causal = bool(getattr(site.module, "is_causal", False))
    made = cls.from_site(site, causal=causal, **{**cls.host_parts(HostTurn.of(site)), **own})
    made.train(site.module.training)
    set_module(model, site.name, Replacement(made, site))
    return made


def load(folder: str | Path, **model_kwargs: Any) -> nn.Module:
    """A model that `Conversion.save` wrote, its mechanisms in it."""
    import transformers
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise HeadwiseError(f"load: {folder} holds no {FILE}: it was not written by Conversion.save.")
    kept = json.loads((folder / FILE).read_text())
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])(config, **model_kwargs)
    by_name = {site.name: site for site in find_sites(model)}
    for name in kept["layers"]:
        replace(model, by_name[name], named(kept["mechanism"]), kept["own"])
    state: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise HeadwiseError(f"load: {folder} lacks {missing[:3]} and has {unexpected[:3]} too much.")
    model.tie_weights()
    return model.eval()


def named(mechanism: str | type[Mechanism]) -> type[Mechanism]:
    if isinstance(mechanism, type) and issubclass(mechanism, Mechanism):
        return mechanism
    if mechanism not in MECHANISMS:
        raise HeadwiseError(
            f"mechanism: a class of headwise.swap or one of {', '.join(MECHANISMS)}; got {mechanism!r}."
        )
    return MECHANISMS[mechanism]


def chosen_layers(layers: Layers, count: int) -> list[int]:
    """Numbers from 0 of the layers a layout means in a model of `count` layers."""
    if layers is None:
        return list(range(count))
    if isinstance(layers, str):
        every = re.fullmatch(r"every(\d+)", layers)
        layouts: dict[str, Iterable[int]] = {
            "all": range(count), "odd": range(0, count, 2), "even": range(1, count, 2), "25%": range(3, count, 4),
            "first": [0], "last": [count - 1], "bilateral": sorted({0, count - 1}),
        }  # fmt: skip
        if every is not None and int(every[1]) > 0:
            return list(range(int(every[1]) - 1, count, int(every[1])))
        if layers not in layouts:
            raise HeadwiseError(f"layers: numbers, everyN, or one of {', '.join(layouts)}; got {layers!r}.")
        return list(layouts[layers])
    wrong = [n for n in layers if not 0 <= n < count]
    if wrong or not layers:
        raise HeadwiseError(f"layers: wanted numbers from 0 to {count - 1}, at least one; got {list(layers)}.")
    return sorted(set(layers))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
