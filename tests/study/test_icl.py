"""The study of in-context learning without induction heads, on a circuit that has one."""

import numpy as np
import pytest
from tests.scan.models import circuit, llama

from headwise.errors import HeadwiseError
from headwise.study.icl import icl_induction, icl_without, paired
from headwise.study.sinks import windows


def test_silencing_the_only_induction_head_is_measured() -> None:
    found = icl_induction(circuit(positions=110), seeds=[0], texts=3, early=(5, 20), late=(60, 90))
    assert found.measured["heads_all"] == 1
    assert found.measured["rise_top5"] == pytest.approx(found.measured["rise_all"])
    assert found.measured["rise_random5"] == [0], "its layer has no other head to draw"
    assert found.verdict in ("holds", "fails")


def test_nothing_silenced_changes_nothing() -> None:
    opened = llama()
    ids = windows(opened, 3, 40)
    clean = icl_without(opened, ids, [], (5, 10), (30, 40))
    assert paired(clean, icl_without(opened, ids, [], (5, 10), (30, 40))) == 1
    assert not np.array_equal(clean, icl_without(opened, ids, [(0, 0), (1, 3)], (5, 10), (30, 40)))


def test_a_model_without_induction_heads_has_nothing_to_silence() -> None:
    with pytest.raises(HeadwiseError, match="no induction head"):
        icl_induction(llama(), texts=2, early=(5, 10), late=(30, 40))
