"""Is this module an attention layer, and how many heads of what width has it? Judged by names and shapes alone."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn

from headwise.models.projections import Projections, find_projections, matrix_or_none

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_q_heads", "num_query_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads", "kv_n_heads")
DIM = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_head", "key_value_proj_dim", "dim_per_head")
QK_DIM = ("qk_head_dim", *DIM)
V_DIM = ("v_head_dim", "value_head_dim", *DIM)
GROUPS = ("num_key_value_groups",)
NOT_SOFTMAX = re.compile(
    r"(?<!Kimi)Linear(Self|Cross)?Att|Delta|Mamba|LSTM|Lightning|Rwkv|RWKV|Retention|Hyena|SSM|XCA|Channel|External"
    r"|LiteMLA|Fourier|Indexer|Additive|DeformableAttention|ShortConv"
)
"""Named after attention, but no softmax over keys in them."""
QUERY_OR_OUTPUT = ("q_proj", "q_a_proj", "q_b_proj", "q_content_proj", "o_proj", "out_proj")


class Size(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def looks_like_attention(module: nn.Module) -> bool:
    """A module with the projections of an attention layer, or named one, that holds no other inside."""
    name = type(module).__name__
    if NOT_SOFTMAX.search(name):
        return False
    if find_projections(module) is not None:
        return bool(re.search(r"Att", name) or attribute(module, HEADS) or attribute(config_of(module), HEADS))
    if not name.endswith(("Attention", "Attn", "MLA")):
        return False
    own = any(hasattr(module, child) for child in QUERY_OR_OUTPUT) and attribute(config_of(module), HEADS)
    if not own and attribute(module, HEADS) is None:
        return False
    return not any(looks_like_attention(inner) for inner in module.modules() if inner is not module)


def measure(module: nn.Module) -> Size | None:
    """Heads and widths; None if the numbers found contradict each other."""
    config = config_of(module)
    if isinstance(module, nn.MultiheadAttention):
        return Size(module.num_heads, module.num_heads, module.head_dim, module.head_dim)
    found = find_projections(module)
    heads = attribute(module, HEADS) or attribute(config, HEADS)
    dim = attribute(module, QK_DIM)
    if found is None or (found.q is None and found.fused is None):
        return from_attributes(module, config, heads, dim)
    if found.k is not None and found.v is not None:
        return from_separate(module, found, heads, dim)
    return from_fused(module, found, config, heads, dim)


def from_separate(module: nn.Module, found: Projections, heads: int | None, dim: int | None) -> Size | None:
    q, k, v = (rows(part) for part in (found.q, found.k, found.v))
    if dim is not None and heads is not None and q not in (heads * dim, 2 * heads * dim):
        if q % dim == 0 and attribute(module, HEADS) is None:
            heads = q // dim  # the config speaks of another part of the model
        else:
            dim = None
    if heads is None:
        heads = q // dim if dim else 1
    if dim is None:
        dim = q // heads
    if q % heads or k % dim:
        return None
    kv_heads = k // dim
    if heads % kv_heads or v % kv_heads:
        return None
    return Size(heads, kv_heads, dim, v // kv_heads)


def from_fused(module: nn.Module, found: Projections, config: Any, heads: int | None, dim: int | None) -> Size | None:
    total = rows(found.fused)
    if heads is None:
        heads = rows(found.q) // dim if found.q is not None and dim else (total // (3 * dim) if dim else 1)
    if found.q is not None:
        width = rows(found.q) // heads
        kv_heads = attribute(module, KV_HEADS) or attribute(config, KV_HEADS) or max(1, total // (2 * width))
        return Size(heads, kv_heads, width, total // kv_heads - width)
    if dim is not None and total % dim == 0 and (total // dim - heads) % 2 == 0 and total // dim > heads:
        kv_heads = (total // dim - heads) // 2
    else:
        kv_heads = attribute(module, KV_HEADS) or attribute(config, KV_HEADS) or heads
        if total % (heads + 2 * kv_heads):
            kv_heads = heads
        dim = total // (heads + 2 * kv_heads)
    if heads % kv_heads or total != dim * (heads + 2 * kv_heads):
        return None
    return Size(heads, kv_heads, dim, dim)


def from_attributes(module: nn.Module, config: Any, heads: int | None, dim: int | None) -> Size | None:
    """For latent attention and other layouts: what the module says about itself."""
    heads = heads or attribute(config, HEADS)
    if heads is None:
        return None
    if dim is None:
        width = attribute(module, ("embed_dim", "hidden_size", "all_head_size", "d_model", "dim"))
        width = width or attribute(config, ("hidden_size", "d_model"))
        dim = width // heads if width else None
    if not dim:
        return None
    kv_heads = attribute(module, KV_HEADS) or heads // (attribute(module, GROUPS) or 1)
    if hasattr(module, "kv_lora_rank"):  # latent keys are spread to all heads before the softmax
        kv_heads = heads
    return Size(heads, kv_heads, dim, attribute(module, V_DIM) or dim)


def rows(module: nn.Module | None) -> int:
    weight = None if module is None else matrix_or_none(module)
    return 0 if weight is None else len(weight)


def config_of(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "to_dict") else None


def attribute(holder: Any, names: tuple[str, ...]) -> int | None:
    """The first of `names` that is a positive whole number on the module or config."""
    for name in names if holder is not None else ():
        try:
            found = getattr(holder, name, None)
        except (AttributeError, ValueError):  # configs of uneven models refuse to name one number for all layers
            continue
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
    return None
