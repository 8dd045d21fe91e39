"""The parts attention is made of: score functions, normalisers and positions, in any combination."""

from headwise.swap.parts.normalisers import Activation, Entmax, Normaliser, Softmax
from headwise.swap.parts.positions import Alibi, Places, Position, Rope
from headwise.swap.parts.scores import Additive, Cosine, Score

__all__ = [
    "Activation",
    "Additive",
    "Alibi",
    "Cosine",
    "Entmax",
    "Normaliser",
    "Places",
    "Position",
    "Rope",
    "Score",
    "Softmax",
]
