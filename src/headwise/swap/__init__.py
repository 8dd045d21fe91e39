"""Other ways to attend: mechanisms with one constructor and one forward, made of parts, and put into trained models.

>>> layer = swap.Attention(64, 4, causal=True, position=swap.Rope())
>>> y = layer(x)
"""

from headwise.swap.add_shortcut import Shortcut, add_shortcut
from headwise.swap.attention import Attention
from headwise.swap.biased import BiasedAttention
from headwise.swap.cache import Cache
from headwise.swap.catalogue import MECHANISMS, make
from headwise.swap.context_broadcast import Broadcasting, ContextBroadcast, broadcast_context
from headwise.swap.convert import Conversion, convert, load
from headwise.swap.distill import distill
from headwise.swap.dual import DualAttention
from headwise.swap.expanding import ExpandingAttention
from headwise.swap.factorized_norm import FactorizedLayerNorm, replace_norm
from headwise.swap.fixed_head import FixedHeadAttention, widen_heads
from headwise.swap.fixed_qk import FixedQKAttention, FixedStream
from headwise.swap.gated_mlp import GatedMLPMixer
from headwise.swap.head_embedding import HeadEmbeddingAttention
from headwise.swap.head_mask import HeadMask, head_gradients
from headwise.swap.kernel_attention import KernelAttention
from headwise.swap.label_attention import LabelAttention
from headwise.swap.layer_shortcut import LayerShortcutAttention
from headwise.swap.mechanism import Mechanism, aux_loss
from headwise.swap.mixture_of_head import MixtureOfHeadAttention
from headwise.swap.multi_hop import MultiHopAttention
from headwise.swap.multi_query import MultiQueryAttention, merge_kv_heads
from headwise.swap.multi_token import MultiTokenAttention
from headwise.swap.neural_attention import NeuralAttention
from headwise.swap.nexus import NexusAttention
from headwise.swap.parts import (
    Activation,
    Additive,
    Alibi,
    Cosine,
    Direct,
    Entmax,
    GeometricBeta,
    Hard,
    KernelScore,
    Normaliser,
    Numerator,
    PairMLP,
    Phase,
    Position,
    PositionSymbols,
    Prior,
    RelativeSymbols,
    Rope,
    Score,
    Sigmoid,
    Softmax,
    SymbolicAttention,
    Symbols,
)
from headwise.swap.patterned import PAL, PATTERNS, PALEncoder, PatternedEncoder, keys_of_patterns
from headwise.swap.positional import PositionalAttention
from headwise.swap.product_keys import ProductKeyMemory
from headwise.swap.score_activation import ScoreActivation
from headwise.swap.self_gate import SelfGateAttention
from headwise.swap.sigmoid import SigmoidAttention
from headwise.swap.slim_projection import EfficientAttention, OptimisedAttention
from headwise.swap.smeared_key import SmearedKey
from headwise.swap.softmax_ablation import SoftmaxAblation
from headwise.swap.structural import StructuralAttention
from headwise.swap.super_attention import SuperAttention
from headwise.swap.taylor_attention import PerOrder, TaylorAttention
from headwise.swap.taylor_rnn import TaylorRNN
from headwise.swap.token_aware_phase import TokenAwarePhaseAttention
from headwise.swap.triadic import LatentTokens, TriadicAttention, modulate
from headwise.swap.upscale import MemoryBlock, Upscaled, depth_upscale

__all__ = [
    "MECHANISMS",
    "PAL",
    "PATTERNS",
    "Activation",
    "Additive",
    "Alibi",
    "Attention",
    "BiasedAttention",
    "Broadcasting",
    "Cache",
    "ContextBroadcast",
    "Conversion",
    "Cosine",
    "Direct",
    "DualAttention",
    "EfficientAttention",
    "Entmax",
    "ExpandingAttention",
    "FactorizedLayerNorm",
    "FixedHeadAttention",
    "FixedQKAttention",
    "FixedStream",
    "GatedMLPMixer",
    "GeometricBeta",
    "Hard",
    "HeadEmbeddingAttention",
    "HeadMask",
    "KernelAttention",
    "KernelScore",
    "LabelAttention",
    "LatentTokens",
    "LayerShortcutAttention",
    "Mechanism",
    "MemoryBlock",
    "MixtureOfHeadAttention",
    "MultiHopAttention",
    "MultiQueryAttention",
    "MultiTokenAttention",
    "NeuralAttention",
    "NexusAttention",
    "Normaliser",
    "Numerator",
    "OptimisedAttention",
    "PALEncoder",
    "PairMLP",
    "PatternedEncoder",
    "PerOrder",
    "Phase",
    "Position",
    "PositionSymbols",
    "PositionalAttention",
    "Prior",
    "ProductKeyMemory",
    "RelativeSymbols",
    "Rope",
    "Score",
    "ScoreActivation",
    "SelfGateAttention",
    "Shortcut",
    "Sigmoid",
    "SigmoidAttention",
    "SmearedKey",
    "Softmax",
    "SoftmaxAblation",
    "StructuralAttention",
    "SuperAttention",
    "SymbolicAttention",
    "Symbols",
    "TaylorAttention",
    "TaylorRNN",
    "TokenAwarePhaseAttention",
    "TriadicAttention",
    "Upscaled",
    "add_shortcut",
    "aux_loss",
    "broadcast_context",
    "convert",
    "depth_upscale",
    "distill",
    "head_gradients",
    "keys_of_patterns",
    "load",
    "make",
    "merge_kv_heads",
    "modulate",
    "replace_norm",
    "widen_heads",
]
