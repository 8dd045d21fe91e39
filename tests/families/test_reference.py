"""The table itself: every family that claims to dispatch does, and its eager attention is what we compare with."""

import pytest
import torch

from .family import Family, batch_of, build, recorded
from .table import DISPATCHING, HAND_WRITTEN, WITHOUT_ATTENTION


def test_the_table_holds_enough_families_once_each():
    ids = [family.id for family in DISPATCHING]
    assert len(ids) == len(set(ids))
    assert len(ids) >= 85


@pytest.mark.parametrize("family", DISPATCHING, ids=lambda family: family.id)
def test_eager_attention_is_recorded(family: Family):
    model = build(family)
    with recorded(model) as calls, torch.no_grad():
        model(**batch_of(family, model))
    assert calls and not any(call.name == "?" for call in calls)
    for call in calls:
        total = call.weights.sum(-1)
        assert call.weights.shape[:3] == call.query.shape[:3]
        assert (total <= 1 + 1e-5).all(), "weights are probabilities; sinks may take a part of them"


@pytest.mark.parametrize("family", [*HAND_WRITTEN, *WITHOUT_ATTENTION], ids=lambda family: family.id)
def test_other_families_never_reach_the_interface(family: Family):
    model = build(family)
    with recorded(model) as calls, torch.no_grad():
        model(**batch_of(family, model))
    assert not calls
