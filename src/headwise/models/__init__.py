"""Opening a model and knowing it: its attention layers, its heads' weights, the names of its tokens."""

from headwise.models.anatomy import Site, attention_kind, find_sites, guess_stream
from headwise.models.open import Opened, open_model
from headwise.models.segments import RELATIVE, Segments, is_relative
from headwise.models.zoo import catalogue, pull

__all__ = [
    "RELATIVE",
    "Opened",
    "Segments",
    "Site",
    "attention_kind",
    "catalogue",
    "find_sites",
    "guess_stream",
    "is_relative",
    "open_model",
    "pull",
]
