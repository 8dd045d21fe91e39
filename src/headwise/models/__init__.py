"""Opening a model and knowing it: its attention layers, its heads' weights, the names of its tokens."""

from headwise.models.anatomy import Site, attention_kind, find_sites, guess_stream

__all__ = ["Site", "attention_kind", "find_sites", "guess_stream"]
