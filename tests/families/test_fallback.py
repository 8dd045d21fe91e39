"""Models outside the registry: served by the function mode with the same exactness, or refused in a clear sentence."""

from __future__ import annotations

import pytest
import torch

import headwise as hw

from .compare import READINGS, TOLERANCE, agree, own_model
from .fallback import FALLBACK, Bare
from .family import Family, batch_of, build, furthest, tensors
from .table import FUNCTION_MODE, HAND_WRITTEN, WITHOUT_ATTENTION
from .truth import recorded_torch


def same_as_alone(model: torch.nn.Module, batch: dict, sites: int | None = None) -> None:
    """What `test_readings` asks of the registry, asked of the function mode."""
    mask = batch.get("attention_mask")
    with torch.no_grad():
        plain = tensors(model(**batch))
        with recorded_torch(model) as calls:
            model(**batch)
        with hw.attend(model, readings=READINGS) as run:
            watched = tensors(model(**batch))
        again = tensors(model(**batch))
    assert furthest(watched, plain, mask) <= TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert calls
    assert {call.name for call in calls} <= {row.site for row in run.report if row.status == "reached"}
    agree(run, calls, batch)
    if sites is not None:
        assert [row.status for row in run.report] == ["reached"] * sites
        assert {row.how for row in run.report} == {"function-mode"}


def silencing_works(model: torch.nn.Module, batch: dict) -> None:
    with torch.no_grad():
        plain = tensors(model(**batch))
        for stream in {row.stream for row in hw.probe(model, batch)}:
            for gain, changes in ((1.0, False), (0.0, True)):
                with hw.attend(model, edits=[hw.HeadGain(layer=0, heads=[1], gain=gain, stream=stream)]):
                    gap = furthest(tensors(model(**batch)), plain, batch.get("attention_mask"))
                assert (gap > 1e-4) == changes, f"{stream}: gain {gain} moved the output by {gap:.2e}"


@pytest.mark.parametrize("bare", FALLBACK, ids=lambda bare: bare.id)
def test_models_of_other_libraries_are_read_and_edited(bare: Bare):
    model = bare.build()
    same_as_alone(model, bare.batch(), bare.sites)
    silencing_works(model, bare.batch())


@pytest.mark.parametrize("family", FUNCTION_MODE, ids=lambda family: family.id)
def test_families_with_their_own_sdpa_class_are_read_and_edited(family: Family):
    model = own_model(family)
    batch = batch_of(family, model)
    same_as_alone(model, batch)
    silencing_works(model, batch)


@pytest.mark.parametrize("family", HAND_WRITTEN, ids=lambda family: family.id)
def test_hand_written_attention_is_refused_with_the_reason(family: Family):
    model = build(family)
    batch = batch_of(family, model)
    rows = hw.probe(model, batch)
    assert rows
    assert {row.status for row in rows} == {"refused"}
    assert all(row.reason for row in rows)
    with torch.no_grad():
        plain = tensors(model(**batch))
        for given in ({"readings": [hw.Entropy()]}, {"edits": [hw.HeadGain(layer=0, heads=[0], gain=0.0)]}):
            with pytest.raises(hw.HeadwiseError, match="by hand"), hw.attend(model, **given):
                model(**batch)
        assert all(torch.equal(a, b) for a, b in zip(plain, tensors(model(**batch)), strict=True))


@pytest.mark.parametrize("family", WITHOUT_ATTENTION, ids=lambda family: family.id)
def test_a_model_without_attention_is_told_so(family: Family):
    model = build(family)
    with pytest.raises(hw.HeadwiseError, match="no attention layers"), hw.attend(model, readings=[hw.Entropy()]):
        model(**batch_of(family, model))
    with pytest.raises(hw.HeadwiseError, match="no attention layers"):
        hw.probe(model, batch_of(family, model))


def test_a_mixed_model_reads_what_it_can_and_names_the_rest():
    """bigbird_pegasus: a hand-written encoder, a decoder that dispatches."""
    from .encoders import SEQ2SEQ

    family = next(family for family in SEQ2SEQ if family.name == "bigbird_pegasus")
    model = build(family)
    batch = batch_of(family, model)
    missed = pytest.warns(UserWarning, match="2 attention layers were not read")
    with torch.no_grad(), missed, hw.attend(model, readings=[hw.Entropy()]) as run:
        model(**batch)
    assert set(run.tree.children) == {"decoder", "cross"}
    assert {row.status for row in run.report if row.stream == "encoder"} == {"refused"}
    silence = hw.HeadGain(layer=0, heads=[0], gain=0.0, stream="encoder")
    refused = pytest.raises(hw.HeadwiseError, match="had no effect")
    with torch.no_grad(), refused, hw.attend(model, edits=[silence]):
        model(**batch)


def test_falcon_under_eager_is_refused_and_says_so():
    """Its eager branch multiplies by hand; only its sdpa branch can be entered."""
    model = build(FUNCTION_MODE[0], "eager")
    batch = batch_of(FUNCTION_MODE[0], model)
    assert {row.status for row in hw.probe(model, batch)} == {"bypassed"}
    refused = pytest.raises(hw.HeadwiseError, match="went past")
    with torch.no_grad(), refused, hw.attend(model, readings=[hw.Entropy()]):
        model(**batch)
