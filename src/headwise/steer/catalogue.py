"""All steering methods there are, by name."""

from __future__ import annotations

from headwise.errors import HeadwiseError
from headwise.steer.act import ACT
from headwise.steer.attention_buckets import AttentionBuckets
from headwise.steer.attn_rank import FlattenBasin
from headwise.steer.concept_heads import ConceptHeads
from headwise.steer.emphasis import Emphasis
from headwise.steer.focus_directions import FocusDirections
from headwise.steer.force_attention import ForceAttention
from headwise.steer.found_in_the_middle import FoundInTheMiddle
from headwise.steer.freeze_positional import FreezeToPositional
from headwise.steer.knockout import Knockout
from headwise.steer.method import Method
from headwise.steer.pattern_mask import PatternMask
from headwise.steer.positional_hidden import PositionalHiddenScaling
from headwise.steer.scale_heads import ScaleHeads
from headwise.steer.soft_injection import SoftInjection
from headwise.steer.split_softmax import SplitSoftmax
from headwise.steer.token_scale import TokenScale
from headwise.steer.uniform_mix import UniformMix
from headwise.steer.zero_tuning import ZeroTuning

METHODS: tuple[type[Method], ...] = (
    TokenScale,
    ZeroTuning,
    Emphasis,
    SplitSoftmax,
    FocusDirections,
    FoundInTheMiddle,
    FlattenBasin,
    AttentionBuckets,
    ACT,
    ForceAttention,
    SoftInjection,
    ConceptHeads,
    Knockout,
    PatternMask,
    PositionalHiddenScaling,
    FreezeToPositional,
    ScaleHeads,
    UniformMix,
)


def find(name: str) -> type[Method]:
    """The method of a name: `TokenScale` or `token_scale`."""
    plain = name.replace("_", "").replace("-", "").lower()
    for kind in METHODS:
        if kind.__name__.lower() == plain:
            return kind
    raise HeadwiseError(f"There is no steering method {name!r}; there are {', '.join(k.__name__ for k in METHODS)}.")
