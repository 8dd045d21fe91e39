"""The studies of lag curves on small models."""

import pytest
from tests.scan.models import circuit, llama

from headwise.errors import HeadwiseError
from headwise.scan import CmrDistance
from headwise.study.lag_curves import cmr_ablation, cmr_depth, cmr_induction

SHORT = CmrDistance(length=30, seeds=1)


def test_an_induction_head_is_nearer_to_the_model_than_its_mirror_image() -> None:
    pytest.importorskip("scipy")
    found = cmr_induction(circuit(positions=110), seeds=[0], question=SHORT)
    (row,) = found.measured["seeds"]
    assert row["induction_heads"] == 1
    assert row["forward_share"] == 1
    assert row["distance_induction"] == pytest.approx(0, abs=1e-6)
    assert row["distance_mirrored"] > 0.5, "no setting of the model recalls strictly backwards"
    with pytest.raises(HeadwiseError, match="no head with a prefix matching"):
        cmr_induction(llama(), seeds=[0], question=SHORT)


def test_depth_is_that_of_the_layer_with_most_such_heads() -> None:
    found = cmr_depth(llama(num_hidden_layers=6), seeds=[0, 1], question=SHORT)
    assert [len(share) for share in found.measured["share_by_layer"]] == [6, 6]
    assert all(0 <= depth <= 1 for depth in found.measured["depth_of_peak"])
    assert found.measured["share_by_layer"][0] != found.measured["share_by_layer"][1], "seeds draw other lists"


def test_silenced_and_random_heads_are_as_many_and_no_random_model_holds() -> None:
    found = cmr_ablation(llama(), seeds=[0, 1], texts=3, share=0.25, question=SHORT, early=(5, 10), late=(40, 60))
    assert found.measured["heads"] == 2
    assert len(found.measured["rise_random"]) == 2
    assert found.measured["rise_cmr"] not in found.measured["rise_random"]
    assert found.verdict in ("holds", "fails")
