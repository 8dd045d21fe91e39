"""Other ways to attend: mechanisms with one constructor and one forward, made of parts, and put into trained models.

>>> layer = swap.Attention(64, 4, causal=True, position=swap.Rope())
>>> y = layer(x)
"""

from headwise.swap.attention import Attention
from headwise.swap.cache import Cache
from headwise.swap.catalogue import MECHANISMS, make
from headwise.swap.convert import Conversion, convert, load
from headwise.swap.mechanism import Mechanism, aux_loss
from headwise.swap.parts import Activation, Additive, Alibi, Cosine, Entmax, Normaliser, Position, Rope, Score, Softmax

__all__ = [
    "MECHANISMS",
    "Activation",
    "Additive",
    "Alibi",
    "Attention",
    "Cache",
    "Conversion",
    "Cosine",
    "Entmax",
    "Mechanism",
    "Normaliser",
    "Position",
    "Rope",
    "Score",
    "Softmax",
    "aux_loss",
    "convert",
    "load",
    "make",
]
