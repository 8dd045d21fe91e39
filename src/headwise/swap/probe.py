"""Whether a layer of a host is attention by its projections as we take it to be, found out by trying."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.models.anatomy import Site
from headwise.swap.adapter import HostTurn, arguments_of
from headwise.swap.attention import Attention
from headwise.swap.mechanism import Mechanism
from headwise.swap.parts.positions import Places, Position

TOKENS = 5
SIZES = (0.25, 1.0, 4.0)
"""Of inputs: small ones show what is added to scores, large ones what turns them."""
NEAR = 1e-4
"""Of the output's size."""


@torch.no_grad()
def position_of(site: Site) -> Position | None:
    """How the layer turns queries and keys: by its host's function all of a head or the first dims of it, or, whatever
    the host hands over, not at all. None where with none of them attention by the layer's weights gives its output, or
    where the layer can't be called by itself."""
    generator = torch.Generator().manual_seed(0)
    dim, device = site.W_Q.shape[1], site.W_Q.device
    x = (torch.randn(len(SIZES), TOKENS, dim, generator=generator) * torch.tensor(SIZES)[:, None, None]).to(device)
    own = copy.deepcopy(site.module).float().eval()
    config: Any = getattr(own, "config", None)
    if config is not None:
        config._attn_implementation = "sdpa"  # a copy's: masks are of one form
    found = called(own, x, generator, site.head_dim)
    if found is None:
        return None
    wanted, angles = found
    names = {id(module): name for name, module in site.module.named_modules()}
    inside = names.get(id(site.out))
    alike = replace(site, module=own, out=site.out if inside is None else own.get_submodule(inside))
    places = Places(torch.arange(TOKENS, device=device)[None], 0, angles)
    for position in (HostTurn.of(site), HostTurn.of(site, part=True), Position()):
        made = Attention.from_site(alike, bool(getattr(own, "is_causal", False)), position=position)
        if equal(made, x, places, wanted):
            return position
    return None


def called(
    module: nn.Module, x: Tensor, generator: torch.Generator, head_dim: int
) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
    """The layer's output, and the angles it was given, as wide as it takes them; None where it takes none."""
    arguments = inspect.signature(module.forward).parameters
    given: dict[str, Any] = {name: None for name, a in arguments.items() if a.default is a.empty and a.kind == 1}
    given[arguments_of(module)[0]] = x
    widths = range(head_dim, 1, -1) if "position_embeddings" in arguments else [0]
    for width in widths:
        angles = None
        if width:
            half = torch.rand(1, TOKENS, -(-width // 2), generator=generator).to(x) * 6
            both = torch.cat([half, half], -1)[..., :width]
            angles = given["position_embeddings"] = (both.cos(), both.sin())
        try:
            out = module(**given)
        except Exception:  # whatever a layer raises at what it doesn't take
            continue
        return (out[0] if isinstance(out, tuple) else out), angles
    return None


def equal(made: Mechanism, x: Tensor, places: Places, wanted: Float[Tensor, "size token dim"]) -> bool:
    try:
        given = made.eval()(x, positions=places)
    except Exception:  # a norm or rotation of other sizes
        return False
    if given.shape != wanted.shape:
        return False
    return bool(((given - wanted).norm(dim=(1, 2)) <= NEAR * wanted.norm(dim=(1, 2))).all())
