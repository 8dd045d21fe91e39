"""Sites: the attention layers of a model, where they are, how many heads they have, and each head's weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from headwise.models import weights
from headwise.models.projections import Projections, find_output, find_projections
from headwise.models.sizes import looks_like_attention, measure
from headwise.models.streams import attention_kind, guess_stream

__all__ = ["Site", "attention_kind", "find_sites", "guess_stream"]


@dataclass(eq=False)
class Site:
    """One attention layer. `layer` counts within the stream; `kind` is "self" or "cross".

    Weights follow `x @ W`: `q[head] = x @ W_Q[head] + b_Q[head]` before any norm or rotation, and the layer's output
    is `sum over heads of z[head] @ W_O[head]`, plus `b_O`. They are views: they follow training and may be edited.
    """

    stream: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    name: str
    module: nn.Module = field(repr=False)
    kind: str = "self"
    out: nn.Module | None = field(default=None, repr=False)
    """The output projection, inside the module or beside it."""

    @classmethod
    def from_call(
        cls,
        module: nn.Module,
        name: str,
        stream: str,
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        kind: str = "self",
        parent: nn.Module | None = None,
    ) -> Site:
        """A site learnt from an attention call that the static search did not foresee."""
        out = find_output(module, parent, heads * value_dim)
        return cls(stream, layer, heads, kv_heads, head_dim, value_dim, name, module, kind, out)

    @property
    def projections(self) -> Projections | None:
        return find_projections(self.module)

    @property
    def group(self) -> int:
        """How many query heads share one key-value head."""
        return self.heads // self.kv_heads

    @property
    def W_Q(self) -> Float[Tensor, "heads d_model head_dim"]:
        return weights.query(self).W

    @property
    def W_K(self) -> Float[Tensor, "kv_heads d_model_kv head_dim"]:
        return weights.key(self).W

    @property
    def W_V(self) -> Float[Tensor, "kv_heads d_model_kv value_dim"]:
        return weights.value(self).W

    @property
    def W_O(self) -> Float[Tensor, "heads value_dim d_model"]:
        return weights.output(self)[0]

    @property
    def b_Q(self) -> Float[Tensor, "heads head_dim"] | None:
        return weights.query(self).b

    @property
    def b_K(self) -> Float[Tensor, "kv_heads head_dim"] | None:
        return weights.key(self).b

    @property
    def b_V(self) -> Float[Tensor, "kv_heads value_dim"] | None:
        return weights.value(self).b

    @property
    def b_O(self) -> Float[Tensor, " d_model"] | None:
        return weights.output(self)[1]


def find_sites(model: nn.Module) -> list[Site]:
    """Every attention layer that can be seen from outside, in the model's own order."""
    modules = dict(model.named_modules())
    sites: list[Site] = []
    layers: Counter[str] = Counter()
    for name, module in modules.items():
        if not looks_like_attention(module):
            continue
        size = measure(module)
        if size is None:
            continue
        kind = attention_kind(module, name)
        stream = guess_stream(model, name, kind)
        parent = modules[name.rpartition(".")[0]] if name else None
        out = find_output(module, parent, size.heads * size.value_dim)
        sites.append(Site(stream, layers[stream], *size, name, module, kind, out))
        layers[stream] += 1
    return sites
