"""The parts attention is made of: score functions, normalisers and positions, in any combination."""

from headwise.swap.parts.hard import Hard
from headwise.swap.parts.kernel_scores import Direct, KernelScore
from headwise.swap.parts.normalisers import Activation, Entmax, Normaliser, Softmax
from headwise.swap.parts.numerators import Numerator
from headwise.swap.parts.pair_mlp import PairMLP
from headwise.swap.parts.phase import Phase
from headwise.swap.parts.positions import Alibi, Places, Position, Rope
from headwise.swap.parts.priors import GeometricBeta, Prior
from headwise.swap.parts.scores import Additive, Cosine, Score
from headwise.swap.parts.sigmoid import Sigmoid
from headwise.swap.parts.symbols import PositionSymbols, RelativeSymbols, SymbolicAttention, Symbols

__all__ = [
    "Activation",
    "Additive",
    "Alibi",
    "Cosine",
    "Direct",
    "Entmax",
    "GeometricBeta",
    "Hard",
    "KernelScore",
    "Normaliser",
    "Numerator",
    "PairMLP",
    "Phase",
    "Places",
    "Position",
    "PositionSymbols",
    "Prior",
    "RelativeSymbols",
    "Rope",
    "Score",
    "Sigmoid",
    "Softmax",
    "SymbolicAttention",
    "Symbols",
]
