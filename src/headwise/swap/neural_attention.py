"""Neural attention: a small network, not a product, says how well a query and a key go together."""

from __future__ import annotations

from typing import Any, ClassVar

from headwise.paper import Paper
from headwise.swap.attention import Attention
from headwise.swap.parts.pair_mlp import Act, PairMLP


class NeuralAttention(Attention):
    """`a_i = softmax_j(MLP([q'_i; k'_j]))`, with q' and k' of `proj_dim` numbers; values and output as ever. See
    `PairMLP` for the network and its settings; `share_heads`: one for all heads, as the paper has it.

    The paper uses it in a model's first layer alone: `swap.convert(model, "neural_attention", layers=[0])`. There the
    projections are the trained ones and the network is new, so that the output at step 0 is not the model's. Rotary
    positions act before queries and keys are shrunk; the network is not invariant to the rotation, so distances are not
    all it sees of them. No library kernel computes such scores: a layer costs what its pairs cost, in blocks.
    """

    paper: ClassVar[Paper] = Paper(
        "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models", "2502.17206"
    )
    what: ClassVar[str] = "scores by a small network that sees query and key together"

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
        proj_dim: int | None = None, hidden: tuple[int | None, int | None] = (None, None), share_heads: bool = True,
        act: Act = "relu", tile: int = 128, **parts: Any,
    ):  # fmt: skip
        width = head_dim or dim // max(heads, 1)
        score = PairMLP(width, proj_dim, hidden, None if share_heads else heads, act, tile)
        super().__init__(dim, heads, kv_heads, head_dim, score=score, **parts)
