"""Puts a mechanism into a trained transformers model, and takes it out again; keeps such a model on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any, Self

from torch import nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site, find_sites
from headwise.models.open import SWAPPED, Opened
from headwise.swap.adapter import Replacement, refuse
from headwise.swap.catalogue import MECHANISMS
from headwise.swap.mechanism import Mechanism
from headwise.swap.probe import position_of

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
        """The whole model as transformers saves it (safetensors, JSON), and beside it what was put in where, by this
        conversion and by others."""
        replaced = {n: m for n, m in self.model.named_modules() if isinstance(m, Replacement)}
        strange = [name for name, module in replaced.items() if module.recipe is None]
        if strange or not replaced:
            raise HeadwiseError(f"save: wanted a converted model; got {', '.join(strange) or 'none, it was undone'}.")
        try:
            text = json.dumps({name: module.recipe for name, module in replaced.items()}, indent=2)
        except TypeError as error:
            raise HeadwiseError(f"save: {error}; give settings that JSON can hold.") from None
        folder = Path(folder)
        # by the names the model has now: others, which transformers may write, say nothing of mechanisms
        self.model.save_pretrained(folder, save_original_format=False)  # type: ignore[operator]
        (folder / SWAPPED).write_text(text + "\n")


def convert(
    model: Opened | nn.Module, mechanism: str | type[Mechanism], layers: Layers = None, **own: Any
) -> Conversion:
    """Replaces attention layers by a mechanism that starts with their weights.

    `layers`: None for all, numbers from 0, or a layout by name: "all", "odd", "even", "25%", "first", "last",
    "bilateral" (counted from 1, as "Deconstructing Attention", arXiv 2510.11602, does), "every4" and so on. `own`:
    what the mechanism is made with beside its sizes; `causal=True` where a host says so only in its calls (CLIP's
    text). The model is changed in place until `undo()`. Dropout of attention weights is not taken over.

    Refused are layers that do what the mechanisms know nothing of: before anything is changed, every layer is called by
    itself, and attention by its weights must give the same.
    """
    inner = model.model if isinstance(model, Opened) else model
    cls = named(mechanism)
    if not isinstance(inner, nn.Module):
        raise HeadwiseError(f"convert: model wants a model, opened or not; got {inner!r}.")
    sites = [site for site in find_sites(inner) if site.kind == "self"]
    streams = {site.stream for site in sites}
    stream = "text" if "text" in streams else next(iter(streams), None)
    sites = [site for site in sites if site.stream == stream]
    if not sites:
        raise HeadwiseError(f"convert: {type(inner).__name__} has no self-attention layer that can be found.")
    chosen = chosen_layers(layers, len(sites))
    converted = {id(module.mechanism) for module in inner.modules() if isinstance(module, Replacement)}
    for site in (sites[n] for n in chosen):
        reason = "it was converted: undo that first" if id(site.module) in converted else refuse(site)
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
    position = position_of(site)
    if position is None:
        raise HeadwiseError(
            f"convert: {site.name} ({type(site.module).__name__}) can't be replaced: attention by its weights alone "
            "gives another output than it does."
        )
    settings = {"causal": bool(getattr(site.module, "is_causal", False)), **cls.host_parts(position), **own}
    try:
        made = cls.from_site(site, **settings)
    except TypeError as error:
        raise HeadwiseError(f"convert: {cls.key()} can't be made with {', '.join(own) or 'that'}: {error}.") from error
    made.train(site.module.training)
    replacement = Replacement(made, site)
    replacement.recipe = {"mechanism": cls.key(), "own": own}
    set_module(model, site.name, replacement)
    return made


def load(folder: str | Path, **model_kwargs: Any) -> nn.Module:
    """A model that `Conversion.save` wrote, its mechanisms in it, in the type it was saved in. `model_kwargs`:
    attn_implementation, or another dtype."""
    import transformers
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / SWAPPED).is_file():
        raise HeadwiseError(f"load: {folder} holds no {SWAPPED}: it was not written by Conversion.save.")
    try:
        recipes = {
            n: (str(r["mechanism"]), dict(r["own"])) for n, r in json.loads((folder / SWAPPED).read_text()).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeadwiseError(f"load: {folder / SWAPPED} doesn't say what stands where: {error!r}.") from None
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0], None)
    if kind is None:
        raise HeadwiseError(f"load: transformers has no {config.architectures[0]}.")
    model = kind._from_config(config, **{"dtype": config.dtype, **model_kwargs})
    by_name = {site.name: site for site in find_sites(model)}
    for name, (mechanism, own) in recipes.items():
        if name not in by_name:
            raise HeadwiseError(f"load: {type(model).__name__} has no layer {name}.")
        replace(model, by_name[name], named(mechanism), own)
    state: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise HeadwiseError(f"load: {folder} lacks {missing[:3]} and has {unexpected[:3]} too much.")
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def named(mechanism: str | type[Mechanism]) -> type[Mechanism]:
    if isinstance(mechanism, type) and issubclass(mechanism, Mechanism) and mechanism is not Mechanism:
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
            layouts[layers] = range(int(every[1]) - 1, count, int(every[1]))
        if layers not in layouts:
            raise HeadwiseError(f"layers: numbers, everyN, or one of {', '.join(layouts)}; got {layers!r}.")
        if not list(layouts[layers]):
            raise HeadwiseError(f"layers: {layers!r} is none of the {count} layers there are.")
        return list(layouts[layers])
    try:
        numbers = [index(n) for n in layers]
    except TypeError:
        raise HeadwiseError(f"layers: wanted a list of numbers, or a layout by name; got {layers!r}.") from None
    if not numbers or not 0 <= min(numbers) <= max(numbers) < count:
        raise HeadwiseError(f"layers: wanted numbers from 0 to {count - 1}, at least one; got {numbers}.")
    return sorted(set(numbers))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
