"""Token-aware phase attention (TAPA): positions as a phase that queries and keys decide themselves."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from headwise.paper import Paper
from headwise.swap.attention import Attention
from headwise.swap.parts.phase import Phase
from headwise.swap.parts.positions import Position


class TokenAwarePhaseAttention(Attention):
    """TAPA: the score of a pair is an amplitude from one part of a head's dims times the cosine of a phase, which is
    `|i-j|^alpha` times a product of the other part (`Phase`). No parameters beyond the projections, no rotation, no
    preference for near or far keys that is known before their content. The paper trains it with a lower learning rate
    than rotary positions (a fifth).

    A causal or full call with or without padding runs in a kernel on CUDA, gradients included. A cache holds the keys
    as they are. In a trained layer the projections are taken over and the layer's rotation is left out, so the output
    at step 0 is not the model's: the model has to be trained on.
    """

    paper: ClassVar[Paper] = Paper("Positional Encoding via Token-Aware Phase Attention", "2509.12635")
    what: ClassVar[str] = "scores times the cosine of a phase that grows with distance and depends on content"

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
        alpha: float = 0.1, theta: float = 0.5, phase: Literal["quadratic", "linear"] = "quadratic", **parts: Any,
    ):  # fmt: skip
        score = Phase(alpha, theta, phase)
        super().__init__(dim, heads, kv_heads, head_dim, score=score, **parts)
        score.amplitude_dims(self.head_dim)  # refuses heads too narrow to be split

    @classmethod
    def host_parts(cls, position: Position) -> dict[str, Any]:
        return {}  # the phase stands for the host's positions
