"""All steering methods there are, by name."""

from __future__ import annotations

from headwise.errors import HeadwiseError
from headwise.steer.emphasis import Emphasis
from headwise.steer.knockout import Knockout
from headwise.steer.method import Method
from headwise.steer.scale_heads import ScaleHeads
from headwise.steer.token_scale import TokenScale
from headwise.steer.zero_tuning import ZeroTuning

METHODS: tuple[type[Method], ...] = (TokenScale, ZeroTuning, Emphasis, Knockout, ScaleHeads)


def find(name: str) -> type[Method]:
    """The method of a name: `TokenScale` or `token_scale`."""
    plain = name.replace("_", "").replace("-", "").lower()
    for kind in METHODS:
        if kind.__name__.lower() == plain:
            return kind
    raise HeadwiseError(f"There is no steering method {name!r}; there are {', '.join(k.__name__ for k in METHODS)}.")
