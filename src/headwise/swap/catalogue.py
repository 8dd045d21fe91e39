"""All mechanisms by name, and making one."""

from __future__ import annotations

from typing import Any

from headwise.errors import HeadwiseError
from headwise.swap.attention import Attention
from headwise.swap.biased import BiasedAttention
from headwise.swap.dual import DualAttention
from headwise.swap.expanding import ExpandingAttention
from headwise.swap.fixed_head import FixedHeadAttention
from headwise.swap.fixed_qk import FixedQKAttention
from headwise.swap.gated_mlp import GatedMLPMixer
from headwise.swap.head_embedding import HeadEmbeddingAttention
from headwise.swap.kernel_attention import KernelAttention
from headwise.swap.label_attention import LabelAttention
from headwise.swap.mechanism import Mechanism
from headwise.swap.mixture_of_head import MixtureOfHeadAttention
from headwise.swap.multi_hop import MultiHopAttention
from headwise.swap.multi_query import MultiQueryAttention
from headwise.swap.multi_token import MultiTokenAttention
from headwise.swap.neural_attention import NeuralAttention
from headwise.swap.nexus import NexusAttention
from headwise.swap.positional import PositionalAttention
from headwise.swap.score_activation import ScoreActivation
from headwise.swap.self_gate import SelfGateAttention
from headwise.swap.sigmoid import SigmoidAttention
from headwise.swap.slim_projection import EfficientAttention, OptimisedAttention
from headwise.swap.smeared_key import SmearedKey
from headwise.swap.softmax_ablation import SoftmaxAblation
from headwise.swap.structural import StructuralAttention
from headwise.swap.super_attention import SuperAttention
from headwise.swap.taylor_attention import TaylorAttention
from headwise.swap.taylor_rnn import TaylorRNN
from headwise.swap.token_aware_phase import TokenAwarePhaseAttention
from headwise.swap.triadic import TriadicAttention

CLASSES: tuple[type[Mechanism], ...] = (
    Attention,
    BiasedAttention,
    DualAttention,
    EfficientAttention,
    ExpandingAttention,
    FixedHeadAttention,
    FixedQKAttention,
    GatedMLPMixer,
    HeadEmbeddingAttention,
    KernelAttention,
    LabelAttention,
    MixtureOfHeadAttention,
    MultiHopAttention,
    MultiQueryAttention,
    MultiTokenAttention,
    NeuralAttention,
    NexusAttention,
    OptimisedAttention,
    PositionalAttention,
    ScoreActivation,
    SelfGateAttention,
    SigmoidAttention,
    SmearedKey,
    SoftmaxAblation,
    StructuralAttention,
    SuperAttention,
    TaylorAttention,
    TaylorRNN,
    TokenAwarePhaseAttention,
    TriadicAttention,
)


MECHANISMS: dict[str, type[Mechanism]] = {mechanism.key(): mechanism for mechanism in CLASSES}


def make(name: str, dim: int, heads: int, **own: Any) -> Mechanism:
    """A mechanism by its name, as `headwise swap list` shows it."""
    if name not in MECHANISMS:
        raise HeadwiseError(f"mechanism: one of {', '.join(MECHANISMS)}; got {name!r}.")
    return MECHANISMS[name](dim, heads, **own)
