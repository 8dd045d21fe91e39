"""Opening a model and knowing it: its attention layers, its heads' weights, the names of its tokens."""

from headwise.models.anatomy import Site, attention_kind, find_sites, guess_stream
from headwise.models.segments import RELATIVE, Segments

__all__ = ["RELATIVE", "Segments", "Site", "attention_kind", "find_sites", "guess_stream"]
