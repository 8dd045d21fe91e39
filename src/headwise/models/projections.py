"""Where an attention module keeps its query, key, value and output projections, whatever it calls them.

Nothing here knows a model: modules are recognised by the names and shapes of their children. The one thing that
cannot be seen from outside is how a fused matrix orders its rows, so that is written down per class.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from headwise.errors import HeadwiseError

SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("q_linear", "k_linear", "v_linear"),
    ("project_q", "project_k", "project_v"),
    ("projection_query", "projection_key", "projection_value"),
    ("q_head", "k_head", "v_head"),
    ("to_query", "to_key", "to_value"),
    ("wq", "wk", "wv"),
    ("Wq", "Wk", "Wv"),
)
FUSED = ("qkv_proj", "qkv", "query_key_value", "Wqkv", "c_attn", "att_proj", "to_qkv", "wqkv", "qkv_linear", "W_pack")
QUERY_AND_FUSED = (("q_attn", "c_attn"), ("q", "kv"), ("q_proj", "kv_proj"), ("to_q", "to_kv"))
OUTPUT = (
    "o_proj", "out_proj", "o", "out_lin", "to_out", "proj", "dense", "c_proj", "wo", "out", "output_proj", "output",
    "linear_out", "post_proj", "final_linear", "Wo", "o_linear", "output_linear", "projection", "to_output",
    "projection_layer",
)  # fmt: skip

BLOCKS = "blocks"
"""Rows ordered [all queries | all keys | all values]."""
GROUPED = "grouped"
"""Rows ordered by key-value head: [its queries, its key, its value], then the next."""
QUARTERS = "quarters"
"""CodeGen's rows: four times [queries, values, keys] of a quarter of the heads, as it was trained on four chips."""
GROUPED_CLASSES = (
    "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention", "FalconAttention",
    "FalconFlashAttention2", "DisentangledSelfAttention",
)  # fmt: skip
OTHER_CLASSES = ("LevitAttention", "LevitAttentionSubsample", "AttentionDownsample", "Attention4D")
"""Known classes whose fused rows follow another order still."""
KNOWN_PACKAGES = ("transformers", "timm", "diffusers", "headwise")


@dataclass(frozen=True)
class Projections:
    """The children of one attention module. `fused` holds q, k, v, or only k, v where `q` stands beside it."""

    q: nn.Module | None = None
    k: nn.Module | None = None
    v: nn.Module | None = None
    fused: nn.Module | None = None
    torch_mha: bool = False


def find_projections(module: nn.Module) -> Projections | None:
    """The projections of `module`, or None if its children don't look like an attention layer's."""
    if isinstance(module, nn.MultiheadAttention):
        return Projections(torch_mha=True)
    children = dict(module.named_children())

    def linear(name: str) -> nn.Module | None:
        child = children.get(name)
        return child if child is not None and matrix_or_none(child) is not None else None

    for query, rest in QUERY_AND_FUSED:
        if linear(query) and linear(rest):
            return Projections(q=linear(query), fused=linear(rest))
    for names in SEPARATE:
        q, k, v = (linear(n) for n in names)
        if q and k and v:
            return Projections(q=q, k=k, v=v)
        if q and k and names[0] == "q_proj" and uses_keys_as_values(module):
            return Projections(q=q, k=k, v=k)
    for name in FUSED:
        if linear(name):
            return Projections(fused=linear(name))
    if type(module).__name__ == "DisentangledSelfAttention" and linear("in_proj"):
        return Projections(fused=linear("in_proj"))
    return None


def uses_keys_as_values(module: nn.Module) -> bool:
    """Gemma 4's full layers may take the key projection for the values as well."""
    return bool(getattr(module, "use_alternative_attention", False))


def find_output(module: nn.Module, parent: nn.Module | None, width: int) -> nn.Module | None:
    """The projection that reads the joined head outputs: in the module, or beside it (BERT's `output.dense`)."""
    places = [module]
    if parent is not None:
        places += [child for name, child in parent.named_children() if name == "output"] + [parent]
    for place in places:
        for name, child in place.named_children():
            if name not in OUTPUT or child is module:
                continue
            if isinstance(child, nn.Sequential | nn.ModuleList) and len(child):
                child = child[0]
            weight = matrix_or_none(child)
            if weight is not None and weight.shape[1] == width:
                return child
    return None


def matrix_or_none(module: nn.Module) -> Tensor | None:
    """The weight as [out, in], or None for something that is not one plain matrix product."""
    inner = getattr(module, "linear", None)
    if isinstance(inner, nn.Linear):  # a linear layer in a wrapper that clips or selects
        module = inner
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):  # an adapter around the layer
        module = base
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    return weight.T if type(module).__name__ == "Conv1D" else weight


def matrix(module: nn.Module, name: str) -> Tensor:
    """The weight as [out, in]; refuses what is not the whole truth (adapters, quantised weights)."""
    weight = matrix_or_none(module)
    if weight is None:
        raise HeadwiseError(f"{name}: {type(module).__name__} holds no single weight matrix, so it has no head views.")
    if hasattr(module, "base_layer"):
        raise HeadwiseError(f"{name} carries an unmerged adapter: merge it (merge_and_unload) to look at head weights.")
    if not weight.is_floating_point():
        raise HeadwiseError(f"{name} holds {weight.dtype} (quantised) weights: load the model in float to view them.")
    return weight


def vector(module: nn.Module) -> Tensor | None:
    """The bias of a projection, if it has one."""
    inner = getattr(module, "linear", None)
    bias = getattr(inner if isinstance(inner, nn.Linear) else module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def fused_order(module: nn.Module) -> str | None:
    """How the rows of this module's fused projection are ordered; None if nobody wrote it down."""
    kind = type(module)
    if kind.__name__ in GROUPED_CLASSES:
        return GROUPED
    if kind.__name__ == "CodeGenAttention":
        return QUARTERS
    if kind.__name__ == "GPTBigCodeAttention" and not getattr(module, "multi_query", True):
        return GROUPED
    if kind.__name__ in OTHER_CLASSES or kind.__module__.split(".")[0] not in KNOWN_PACKAGES:
        return None
    return BLOCKS
