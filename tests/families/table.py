"""Every row of the matrix, by how its model lets headwise in."""

from .causal import CAUSAL
from .encoders import ENCODERS, SEQ2SEQ
from .fallback import FALLBACK
from .multimodal import MULTIMODAL
from .refused import FUNCTION_MODE, HAND_WRITTEN, WITHOUT_ATTENTION
from .signals import SIGNALS
from .vision import DETECTION, VISION

DISPATCHING = CAUSAL + ENCODERS + SEQ2SEQ + VISION + DETECTION + SIGNALS + MULTIMODAL

__all__ = ["DISPATCHING", "FALLBACK", "FUNCTION_MODE", "HAND_WRITTEN", "WITHOUT_ATTENTION"]
