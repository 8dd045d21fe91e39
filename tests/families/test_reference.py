"""The table itself: enough families, and those that are said not to dispatch don't."""

import pytest
import torch

from .family import Family, batch_of, build, recorded
from .table import DISPATCHING, HAND_WRITTEN, WITHOUT_ATTENTION


def test_the_table_holds_enough_families_once_each():
    ids = [family.id for family in DISPATCHING]
    assert len(ids) == len(set(ids))
    assert len(ids) >= 85


@pytest.mark.parametrize("family", [*HAND_WRITTEN, *WITHOUT_ATTENTION], ids=lambda family: family.id)
def test_other_families_never_reach_the_interface(family: Family):
    model = build(family)
    with recorded(model) as calls, torch.no_grad():
        model(**batch_of(family, model))
    assert not calls
