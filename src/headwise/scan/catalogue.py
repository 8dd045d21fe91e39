"""All questions there are. `CORE` are asked when none are named; `MORE` by name, or with `questions="all"`."""

from __future__ import annotations

from headwise.scan.basin import AttentionBasin
from headwise.scan.contextual_heads import ContextualHeads
from headwise.scan.copying import CopyHeads
from headwise.scan.density import Density
from headwise.scan.dependence import InputDependence
from headwise.scan.distance import Distance
from headwise.scan.distance_bias import DistanceBias
from headwise.scan.effective_beta import EffectiveBeta
from headwise.scan.entropies import FeatureEntropy
from headwise.scan.entropy import Entropy
from headwise.scan.induction import InductionHeads
from headwise.scan.lag_curves import CmrDistance
from headwise.scan.long_context import LongContextHeads
from headwise.scan.maps_relations import MapsRelations
from headwise.scan.maps_salient import SalientOperations
from headwise.scan.mixing import Concentration
from headwise.scan.name_movers import NameMovers
from headwise.scan.options import NegativeHeads, OptionHeads
from headwise.scan.position_prior import PositionPrior
from headwise.scan.positional import PositionalHeads
from headwise.scan.question import Question
from headwise.scan.reference_frames import ReferenceFrames
from headwise.scan.relations import RelationHeads
from headwise.scan.retrieval import RetrievalHeads
from headwise.scan.score_rank import ScoreRank
from headwise.scan.secondary_sinks import SecondarySinks
from headwise.scan.selection import SelectionCapacity
from headwise.scan.sink_anatomy import SinkAnatomy
from headwise.scan.sink_census import SinkCensus
from headwise.scan.sinks import Sinks
from headwise.scan.surface import SurfacePatterns
from headwise.scan.taylor import TaylorOrders
from headwise.scan.text_roles import TextRoles
from headwise.scan.topics import TopicAttention
from headwise.scan.uniform_query import UniformQuery
from headwise.scan.unselectable import UnselectableKeys
from headwise.scan.waveform import WaveformHeads

CORE: tuple[type[Question], ...] = (
    Sinks,
    Entropy,
    Distance,
    PositionalHeads,
    InductionHeads,
    CopyHeads,
    RetrievalHeads,
)
MORE: tuple[type[Question], ...] = (
    TextRoles,
    NameMovers,
    OptionHeads,
    NegativeHeads,
    SurfacePatterns,
    RelationHeads,
    FeatureEntropy,
    CmrDistance,
    WaveformHeads,
    Concentration,
    Density,
    InputDependence,
    LongContextHeads,
    DistanceBias,
    AttentionBasin,
    ContextualHeads,
    PositionPrior,
    ReferenceFrames,
    SecondarySinks,
    SinkAnatomy,
    SinkCensus,
    TopicAttention,
    EffectiveBeta,
    MapsRelations,
    SalientOperations,
    ScoreRank,
    SelectionCapacity,
    TaylorOrders,
    UniformQuery,
    UnselectableKeys,
)
QUESTIONS = CORE + MORE
"""In the order of the report."""
