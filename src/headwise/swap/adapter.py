"""A mechanism in the place of a transformers attention layer: called as that is, with its masks, angles and caches."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from headwise.attention.incoming import Frame, read_mask
from headwise.attention.mask import Mask
from headwise.attention.seam import entrance
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Mechanism
from headwise.swap.parts.positions import Places, Position


class HostTurn(Position):
    """The host's own rotation, by its own function; nothing where it hands over no angles. `part`: the function turns
    all it is given, and gets as many dims of a head as there are angles, as the host's layer gives it."""

    def __init__(self, turn: Callable[..., tuple[Tensor, Tensor]] | None, part: bool = False):
        super().__init__()
        self._turn, self.part = turn, part

    @classmethod
    def of(cls, site: Site, part: bool = False) -> HostTurn:
        return cls(getattr(sys.modules.get(type(site.module).__module__), "apply_rotary_pos_emb", None), part)

    def turn(self, x: Tensor, places: Places) -> Tensor:
        if places.cos_sin is None:
            return x
        if self._turn is None:
            raise HeadwiseError("The host hands over rotation angles, but its module has no apply_rotary_pos_emb.")
        width = places.cos_sin[0].shape[-1] if self.part else x.shape[-1]
        turned = self._turn(x[..., :width], x[..., :width], *places.cos_sin)[0]
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


class MechanismLayer(DynamicLayer):
    """One layer of a transformers cache that holds whatever its mechanism keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()
        self.mechanism: Mechanism | None = None

    def get_seq_length(self) -> int:
        return 0 if self.mechanism is None else self.cache.of(self.mechanism).length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.cache = Cache()

    def crop(self, tokens_to_remove: int) -> None:
        self.cache.crop(self.get_seq_length() - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.map(lambda tensor: tensor[indices])


class Replacement(nn.Module):
    """What stands in the host model. `mechanism` does the work, `layer_idx` is the host's number of the layer."""

    def __init__(self, mechanism: Mechanism, site: Site):
        super().__init__()
        self.mechanism = mechanism
        self.layer_idx = getattr(site.module, "layer_idx", site.layer)
        self.site_name = site.name
        self.arguments = arguments_of(site.module)
        config = getattr(site.module, "config", None)
        window = getattr(site.module, "sliding_window", getattr(config, "sliding_window", None))
        self.window = window if isinstance(window, int) else None
        self.recipe: dict[str, Any] | None = None
        """What a file says of how the mechanism was made."""

    def forward(self, *args: Any, **named: Any) -> tuple[Tensor, None]:
        given = {**dict(zip(self.arguments, args, strict=False)), **named}
        x: Tensor = given.pop(self.arguments[0])
        odd = [n for n in ("encoder_hidden_states", "s_aux") if given.get(n) is not None]
        if odd:
            raise HeadwiseError(f"{self.site_name}: the host hands over {', '.join(odd)}, which {self} does not take.")
        cache = given.get("past_key_values")
        layer = None if cache is None else self.layer_of(cache)
        past = 0 if layer is None else layer.get_seq_length()
        rows, queries = x.shape[:2]
        mask, first = self.mask(given, x, past)
        ids = given.get("position_ids")
        if ids is None:
            ids = torch.arange(past, past + queries, device=x.device)[None].expand(rows, -1)
        angles = given.get("position_embeddings")
        if angles is not None:
            angles = tuple(part if part.ndim > 2 else part[None] for part in angles)  # some hosts know no batch
        places = Places(ids, first, angles)
        kept = None if layer is None else layer.cache
        return self.mechanism(x, mask=mask, positions=places, cache=kept), None

    def mask(self, given: dict[str, Any], x: Tensor, past: int) -> tuple[Mask, int]:
        """What the host's mask says, in places of all tokens so far, and the place of the first query."""
        tensor, keys, queries = given.get("attention_mask"), past + x.shape[1], x.shape[1]
        causal = given.get("is_causal")
        if causal and not self.mechanism.causal:
            raise HeadwiseError(f"{self.site_name}: the host asks for causal attention: convert it with causal=True.")
        causal = self.mechanism.causal if causal is None else causal
        padding = isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape == (len(x), keys)
        if tensor is None or padding:  # the host leaves the causal order to its kernel
            left = self.window - 1 if causal and self.window else None
            valid = None if tensor is None else tensor.bool()
            return Mask(left, 0 if causal and queries > 1 else None, valid, batch=len(x)), past
        seen = tensor.seq_lengths[1] if hasattr(tensor, "seq_lengths") else tensor.shape[-1]
        mask, first, _, _ = read_mask(Frame(past), tensor, x, seen, queries)
        more = keys - seen  # what the host's cache has forgotten, as no window reaches it, and ours has not
        hidden = {"key_valid": False, "allowed": False, "added": torch.finfo(x.dtype).min}
        padded: dict[str, Any] = {
            name: nn.functional.pad(getattr(mask, name), (more, 0), value=value)
            for name, value in hidden.items()
            if more and getattr(mask, name) is not None
        }
        if padded:
            mask = replace(mask, **padded, _cache={})
        if hasattr(tensor, "mask_mod"):  # it counts from the first query and key of the call
            host = tensor.mask_mod
            mask = replace(mask, rule=lambda b, h, i, j: host(b, h, i - past, j - more) & (j >= more), _cache={})
        return mask, first

    def layer_of(self, past_key_values: Any) -> MechanismLayer:
        """This layer's place in the host's cache, made ours at the first call."""
        if isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = past_key_values.self_attention_cache
        if not isinstance(past_key_values, DynamicCache):
            raise HeadwiseError(
                f"{self.site_name}: a converted layer keeps what its mechanism needs in a DynamicCache; got "
                f"{type(past_key_values).__name__}."
            )
        layers = past_key_values.layers
        while len(layers) <= self.layer_idx:
            layers.append(DynamicLayer())
        layer = layers[self.layer_idx]
        if not isinstance(layer, MechanismLayer):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise HeadwiseError(
                    f"{self.site_name}: the cache keeps more than keys and values of this layer, in a "
                    f"{type(layer).__name__}: generate with use_cache=False."
                )
            layer = layers[self.layer_idx] = MechanismLayer()
            layer.mechanism = self.mechanism
        return layer


def arguments_of(module: nn.Module) -> list[str]:
    """The names of what a module is called with, in order."""
    return list(inspect.signature(module.forward).parameters)


def refuse(site: Site) -> str | None:
    """Why a layer can't be replaced, or None when it can."""
    module = site.module
    if site.kind != "self":
        return "it attends to another sequence"
    if entrance(module) != "registry":
        return "it is not called by transformers' attention interface"
    if getattr(module, "rotary_emb", None) is not None:
        return "it makes its rotation angles itself"
    if "position_bias" in inspect.signature(module.forward).parameters:
        return "its layers hand a position bias on to each other"
    odd = [n for n in ("sinks", "attn_logit_softcapping") if getattr(module, n, None) is not None]
    return f"it has {', '.join(odd)}" if odd else None
