"""The blocks of a stream: the layer around each attention site, and the last matrix of its feed-forward part."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site


@dataclass(frozen=True, eq=False)
class Block:
    """One layer of the residual stream. `last` is the feed-forward part's last matrix: its input are the features
    (neurons after the activation), its output is what the part writes; None where there is no such one matrix."""

    layer: int
    name: str
    module: nn.Module = field(repr=False)
    site: Site = field(repr=False)
    last: nn.Module | None = field(repr=False)


def find_blocks(model: nn.Module, sites: list[Site], stream: str) -> list[Block]:
    """The blocks of a stream, in the order of its layers; a model that is no list of layers is refused."""
    parts = dict(model.named_modules())
    mine = [site for site in sites if site.stream == stream]
    if not mine:
        known = ", ".join(dict.fromkeys(site.stream for site in sites))
        raise HeadwiseError(f"stream: there is no stream {stream!r}; this model has {known}.")
    blocks = []
    for site in mine:
        name = listed(parts, site.name, [one.name for one in mine])
        if name is None:
            raise HeadwiseError(
                f"{type(model).__name__} keeps its layer {site.name} outside of any list of layers, so that the block "
                "around it cannot be found."
            )
        blocks.append(Block(site.layer, name, parts[name], site, last_matrix(parts[name], site)))
    names = [block.name for block in blocks]
    if len(set(names)) != len(names):
        raise HeadwiseError(f"{type(model).__name__} has several {stream} attentions in one block: name them by site.")
    return blocks


def listed(parts: dict[str, nn.Module], name: str, names: list[str]) -> str | None:
    """The outermost item of a list of modules around `name` (or itself) that holds no other of `names`: the block, not
    the stage of blocks around it, nor the sub-layer inside it. Where every item holds others, the innermost."""
    words = name.split(".")
    items = [
        ".".join(words[:end])
        for end in range(1, len(words) + 1)
        if words[end - 1].isdigit() and isinstance(parts.get(".".join(words[: end - 1])), nn.ModuleList | nn.Sequential)
    ]
    alone = [item for item in items if sum(one == item or one.startswith(f"{item}.") for one in names) == 1]
    return next(iter(alone), items[-1] if items else None)


def last_matrix(block: nn.Module, site: Site) -> nn.Module | None:
    """The last matrix of the block outside of its attention. None where a block mixes experts: there are several."""
    if any(name.split(".")[-1] in ("experts", "router") for name, _ in block.named_modules()):
        return None
    found = matrices(block, site)
    return found[-1] if found else None


def matrices(block: nn.Module, site: Site) -> list[nn.Module]:
    """All matrices of the block outside of its attention, in their order."""
    inside = set(site.module.modules()) | ({site.out} if site.out is not None else set())
    return [m for m in block.modules() if m not in inside and is_matrix(m) and not attends(m, block)]


def is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def attends(module: nn.Module, block: nn.Module) -> bool:
    """Whether a matrix belongs to another attention of the block (cross-attention beside self-attention)."""
    name = next(name for name, m in block.named_modules() if m is module)
    return any("attn" in word.lower() or "attention" in word.lower() for word in name.split(".")[:-1])
