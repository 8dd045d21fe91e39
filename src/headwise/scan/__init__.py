"""Questions about heads: which are sinks, which look back one token, which do induction or retrieval?

`scan.heads(opened, texts=[...])` asks all questions that fit; a question is a small class of its own file.
"""

from headwise.attention.waveform import rope_frequencies, rope_peaks, rope_waveform
from headwise.scan.alignment import Alignment, align, delayed
from headwise.scan.attention_graph import attention_graphs
from headwise.scan.basin import AttentionBasin, basin_layer, edge_ratio
from headwise.scan.catalogue import CORE, QUESTIONS
from headwise.scan.class_attention import class_attention, embedding_contrast
from headwise.scan.clustering import behaviours, head_distance, head_map, layer_contrast
from headwise.scan.cmr import cmr_fit, cmr_table
from headwise.scan.collapse import collapse_curves, mixing_bound
from headwise.scan.comparison import Comparison, compare
from headwise.scan.contextual_heads import ContextualHeads
from headwise.scan.copying import CopyHeads
from headwise.scan.density import Density
from headwise.scan.dependence import InputDependence
from headwise.scan.distance import Distance
from headwise.scan.distance_bias import DistanceBias
from headwise.scan.effective_beta import EffectiveBeta
from headwise.scan.entropies import FeatureEntropy, gaussian_entropy, transfer_entropy
from headwise.scan.entropy import Entropy
from headwise.scan.features import head_features, layer_features
from headwise.scan.fisher import attention_fisher
from headwise.scan.grammar import Arc, Sentence, read_conllu
from headwise.scan.head_similarity import head_similarity, layer_matches
from headwise.scan.icl import IclScore, icl_score
from headwise.scan.induction import InductionHeads
from headwise.scan.key_moments import KeyMoments
from headwise.scan.label_contribution import label_contribution
from headwise.scan.lag_curves import CmrDistance
from headwise.scan.layer_alignment import Advantage, ila_index, ila_interval, layer_alignment
from headwise.scan.layer_similarity import layer_similarity
from headwise.scan.long_context import LongContextHeads
from headwise.scan.maps_relations import MapsRelations, RelationMap, relation_scores
from headwise.scan.maps_salient import SalientOperations, describe_rules, salient_mappings, salient_prompt
from headwise.scan.mixing import Concentration
from headwise.scan.name_movers import NameMovers
from headwise.scan.needles import NEEDLES, Needle
from headwise.scan.options import NegativeHeads, OptionHeads
from headwise.scan.passes import Plan
from headwise.scan.position_prior import PositionPrior, edge_posterior
from headwise.scan.positional import PositionalHeads
from headwise.scan.positional_channels import PositionalChannels, positional_channels
from headwise.scan.probing import AttentionProbe, DistanceProbe, attachment, train_probe, word_maps
from headwise.scan.question import Column, Prompt, Question
from headwise.scan.reference_frames import ReferenceFrames, frame_type
from headwise.scan.relation_table import relation_heads
from headwise.scan.relations import RelationHeads
from headwise.scan.result import Scan
from headwise.scan.retrieval import RetrievalHeads
from headwise.scan.run import heads, plan
from headwise.scan.score_rank import ScoreRank
from headwise.scan.sdm import fit_beta, log_intersection, radius_of_beta
from headwise.scan.secondary_sinks import SecondarySinks
from headwise.scan.selection import SelectionCapacity, critical_top, softmax_jacobian_norm
from headwise.scan.similarity import similarity
from headwise.scan.sink_anatomy import SinkAnatomy
from headwise.scan.sink_census import SinkCensus
from headwise.scan.sink_tokens import later_sink_tokens, secondary_sink_tokens, sink_effects
from headwise.scan.sinks import Sinks
from headwise.scan.spectrum import mp_outliers
from headwise.scan.surface import SurfacePatterns
from headwise.scan.taylor import TaylorOrders
from headwise.scan.text_roles import TextRoles
from headwise.scan.token_maps import token_map
from headwise.scan.topics import TopicAttention
from headwise.scan.trajectory import dip_and_rise, entropy_trajectory, stable_rank
from headwise.scan.uniform_query import UniformQuery
from headwise.scan.unselectable import UnselectableKeys, unselectable
from headwise.scan.waveform import WaveformHeads, model_frequencies
from headwise.scan.word_pairs import Relation

__all__ = [
    "CORE",
    "NEEDLES",
    "QUESTIONS",
    "Advantage",
    "Alignment",
    "Arc",
    "AttentionBasin",
    "AttentionProbe",
    "CmrDistance",
    "Column",
    "Comparison",
    "Concentration",
    "ContextualHeads",
    "CopyHeads",
    "Density",
    "Distance",
    "DistanceBias",
    "DistanceProbe",
    "EffectiveBeta",
    "Entropy",
    "FeatureEntropy",
    "IclScore",
    "InductionHeads",
    "InputDependence",
    "KeyMoments",
    "LongContextHeads",
    "MapsRelations",
    "NameMovers",
    "Needle",
    "NegativeHeads",
    "OptionHeads",
    "Plan",
    "PositionPrior",
    "PositionalChannels",
    "PositionalHeads",
    "Prompt",
    "Question",
    "ReferenceFrames",
    "Relation",
    "RelationHeads",
    "RelationMap",
    "RetrievalHeads",
    "SalientOperations",
    "Scan",
    "ScoreRank",
    "SecondarySinks",
    "SelectionCapacity",
    "Sentence",
    "SinkAnatomy",
    "SinkCensus",
    "Sinks",
    "SurfacePatterns",
    "TaylorOrders",
    "TextRoles",
    "TopicAttention",
    "UniformQuery",
    "UnselectableKeys",
    "WaveformHeads",
    "align",
    "attachment",
    "attention_fisher",
    "attention_graphs",
    "basin_layer",
    "behaviours",
    "class_attention",
    "cmr_fit",
    "cmr_table",
    "collapse_curves",
    "compare",
    "critical_top",
    "delayed",
    "describe_rules",
    "dip_and_rise",
    "edge_posterior",
    "edge_ratio",
    "embedding_contrast",
    "entropy_trajectory",
    "fit_beta",
    "frame_type",
    "gaussian_entropy",
    "head_distance",
    "head_features",
    "head_map",
    "head_similarity",
    "heads",
    "icl_score",
    "ila_index",
    "ila_interval",
    "label_contribution",
    "later_sink_tokens",
    "layer_alignment",
    "layer_contrast",
    "layer_features",
    "layer_matches",
    "layer_similarity",
    "log_intersection",
    "mixing_bound",
    "model_frequencies",
    "mp_outliers",
    "plan",
    "positional_channels",
    "radius_of_beta",
    "read_conllu",
    "relation_heads",
    "relation_scores",
    "rope_frequencies",
    "rope_peaks",
    "rope_waveform",
    "salient_mappings",
    "salient_prompt",
    "secondary_sink_tokens",
    "similarity",
    "sink_effects",
    "softmax_jacobian_norm",
    "stable_rank",
    "token_map",
    "train_probe",
    "transfer_entropy",
    "unselectable",
    "word_maps",
]
