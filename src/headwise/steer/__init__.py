"""Edits of a running model, training-free and undone exactly.

`with steer.apply(opened, steer.TokenScale(gain=2.0), segments=...):` steers every forward inside, also of
`generate()`. A method is a small class of its own file.
"""

from headwise.steer.catalogue import METHODS
from headwise.steer.choices import Choice, accuracy, option_entropy, option_logprobs
from headwise.steer.emphasis import Emphasis
from headwise.steer.force_attention import ForceAttention
from headwise.steer.found_in_the_middle import FoundInTheMiddle
from headwise.steer.knockout import Knockout
from headwise.steer.method import Method, apply
from headwise.steer.recipe import Recipe
from headwise.steer.scale_heads import ScaleHeads
from headwise.steer.split_softmax import SplitSoftmax
from headwise.steer.token_scale import TokenScale
from headwise.steer.zero_tuning import ZeroTuning

__all__ = [
    "METHODS",
    "Choice",
    "Emphasis",
    "ForceAttention",
    "FoundInTheMiddle",
    "Knockout",
    "Method",
    "Recipe",
    "ScaleHeads",
    "SplitSoftmax",
    "TokenScale",
    "ZeroTuning",
    "accuracy",
    "apply",
    "option_entropy",
    "option_logprobs",
]
