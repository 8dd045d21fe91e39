"""Edits of a running model, training-free and undone exactly.

`with steer.apply(opened, steer.TokenScale(gain=2.0), segments=...):` steers every forward inside, also of
`generate()`. A method is a small class of its own file.
"""

from headwise.steer.act import ACT
from headwise.steer.attention_buckets import AttentionBuckets
from headwise.steer.attn_rank import FlattenBasin, attn_rank, rerank
from headwise.steer.calibration import calibrate
from headwise.steer.catalogue import METHODS
from headwise.steer.choices import Choice, accuracy, option_entropy, option_logprobs
from headwise.steer.choose_buckets import choose_buckets
from headwise.steer.concept_heads import ConceptHeads, concept_scores, concept_tokens
from headwise.steer.emphasis import Emphasis
from headwise.steer.examples import Example, read_examples
from headwise.steer.first_token import first_token_leverage, first_token_slopes
from headwise.steer.focus_directions import Focus, FocusDirections
from headwise.steer.force_attention import ForceAttention
from headwise.steer.found_in_the_middle import FoundInTheMiddle, place_attention
from headwise.steer.freeze_positional import FreezeToPositional
from headwise.steer.head_pursuit import head_pursuit, head_rows, logit_lens, unembedding
from headwise.steer.knockout import Knockout
from headwise.steer.method import Method, apply
from headwise.steer.pattern_mask import MatchingTokens, PatternMask
from headwise.steer.positional_hidden import PositionalHiddenScaling
from headwise.steer.prompts import mark_first, mark_last
from headwise.steer.pursuit import Pursuit, somp
from headwise.steer.recipe import Recipe
from headwise.steer.scale_heads import ScaleHeads
from headwise.steer.soft_injection import SoftInjection, task_embedding
from headwise.steer.split_softmax import SplitSoftmax
from headwise.steer.token_scale import TokenScale
from headwise.steer.uniform_mix import UniformMix
from headwise.steer.zero_tuning import ZeroTuning

__all__ = [
    "ACT",
    "METHODS",
    "AttentionBuckets",
    "Choice",
    "ConceptHeads",
    "Emphasis",
    "Example",
    "FlattenBasin",
    "Focus",
    "FocusDirections",
    "ForceAttention",
    "FoundInTheMiddle",
    "FreezeToPositional",
    "Knockout",
    "MatchingTokens",
    "Method",
    "PatternMask",
    "PositionalHiddenScaling",
    "Pursuit",
    "Recipe",
    "ScaleHeads",
    "SoftInjection",
    "SplitSoftmax",
    "TokenScale",
    "UniformMix",
    "ZeroTuning",
    "accuracy",
    "apply",
    "attn_rank",
    "calibrate",
    "choose_buckets",
    "concept_scores",
    "concept_tokens",
    "first_token_leverage",
    "first_token_slopes",
    "head_pursuit",
    "head_rows",
    "logit_lens",
    "mark_first",
    "mark_last",
    "option_entropy",
    "option_logprobs",
    "place_attention",
    "read_examples",
    "rerank",
    "somp",
    "task_embedding",
    "unembedding",
]
