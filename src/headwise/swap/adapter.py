"""A mechanism in the place of a transformers attention layer: called as that is, with its masks, angles and caches."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from headwise.attention.incoming import Frame, read_mask
from headwise.attention.seam import entrance
from headwise.errors import HeadwiseError
from headwise.models.anatomy import Site
from headwise.swap.cache import Cache
from headwise.swap.mechanism import Mechanism
from headwise.swap.parts.positions import Places, Position


class HostTurn(Position):
    """The host's own rotation, by its own function; nothing where it hands over no angles."""

    def __init__(self, turn: Callable[..., tuple[Tensor, Tensor]] | None):
        super().__init__()
        self._turn = turn

    @classmethod
    def of(cls, site: Site) -> HostTurn:
        return cls(getattr(sys.modules.get(type(site.module).__module__), "apply_rotary_pos_emb", None))

    def turn(self, x: Tensor, places: Places) -> Tensor:
        if places.cos_sin is None:
            return x
        if self._turn is None:
            raise HeadwiseError("The host hands over rotation angles, but its module has no apply_rotary_pos_emb.")
        return self._turn(x, x, *places.cos_sin)[0]


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

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        odd = [n for n in ("encoder_hidden_states", "s_aux") if rest.get(n) is not None]
        if odd:
            raise HeadwiseError(f"{self.site_name}: the host hands over {', '.join(odd)}, which {self} does not take.")
        layer = None if past_key_values is None else self.layer_of(past_key_values)
        past = 0 if layer is None else layer.get_seq_length()
        rows, queries = hidden_states.shape[:2]
        mask, first, j0, _ = read_mask(Frame(past), attention_mask, hidden_states, past + queries, queries)
        if j0:
            raise HeadwiseError(f"{self.site_name}: a cache that drops its first tokens can't be used here.")
        if attention_mask is None and self.mechanism.causal and queries > 1:
            mask.right, first = 0, past
        ids = rest.get("position_ids")
        if ids is None:
            ids = torch.arange(past, past + queries, device=hidden_states.device)[None].expand(rows, -1)
        places = Places(ids, first, position_embeddings)
        cache = None if layer is None else layer.cache
        return self.mechanism(hidden_states, mask=mask, positions=places, cache=cache), None

    def layer_of(self, past_key_values: Any) -> MechanismLayer:
        """This layer's place in the host's cache, made ours at the first call."""
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
            layer = layers[self.layer_idx] = MechanismLayer()
            layer.mechanism = self.mechanism
        return layer


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
