"""Other ways to attend: mechanisms with one constructor and one forward, made of parts, and put into trained models.

>>> layer = swap.Attention(64, 4, causal=True, position=swap.Rope())
>>> y = layer(x)
"""

from headwise.swap.attention import Attention
from headwise.swap.cache import Cache
from headwise.swap.catalogue import MECHANISMS, make
from headwise.swap.convert import Conversion, convert, load
from headwise.swap.fixed_head import FixedHeadAttention
from headwise.swap.head_embedding import HeadEmbeddingAttention
from headwise.swap.mechanism import Mechanism, aux_loss
from headwise.swap.mixture_of_head import MixtureOfHeadAttention
from headwise.swap.multi_query import MultiQueryAttention
from headwise.swap.multi_token import MultiTokenAttention
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
    "FixedHeadAttention",
    "HeadEmbeddingAttention",
    "Mechanism",
    "MixtureOfHeadAttention",
    "MultiQueryAttention",
    "MultiTokenAttention",
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
