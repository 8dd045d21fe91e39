"""Under `attend`, every family computes what it computes alone, and its readings are those of its eager weights."""

from collections import Counter

import pytest
import torch

import headwise as hw
from headwise.attention.engine import force_path

from .compare import READINGS, TOLERANCE, agree, own_model
from .family import Family, batch_of, build, furthest, recorded, tensors
from .table import DISPATCHING

FAMILIES = pytest.mark.parametrize("family", DISPATCHING, ids=lambda family: family.id)


def configs(model: torch.nn.Module) -> list[tuple[int, str]]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return sorted((key, repr(vars(config))) for key, config in found.items())


@FAMILIES
@pytest.mark.filterwarnings("ignore:.*attention layers were not read")
def test_readings_equal_eager_and_outputs_do_not_change(family: Family):
    eager, model = build(family), own_model(family)
    batch = batch_of(family, model)
    before = configs(model)
    with torch.no_grad():
        plain = tensors(model(**batch))
        with recorded(eager) as calls:
            whole = tensors(eager(**batch))
        with hw.attend(model, readings=READINGS) as run:
            watched = tensors(model(**batch))
        after = tensors(model(**batch))
    mask = batch.get("attention_mask")
    assert furthest(watched, plain, mask) <= TOLERANCE
    assert furthest(watched, whole, mask) <= TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True)), "the model is not as it was"
    assert configs(model) == before
    agree(run, calls, batch)
    reached = {row.site for row in run.report if row.status == "reached"}
    assert {call.name for call in calls} <= reached
    assert all(row.reason for row in run.report)


@FAMILIES
@pytest.mark.filterwarnings("ignore:.*attention layers were not read")
def test_the_streaming_path_agrees(family: Family):
    model = build(family)
    batch = batch_of(family, model)
    with torch.no_grad(), recorded(model) as calls:
        whole = tensors(model(**batch))
    with torch.no_grad(), force_path("stream"), hw.attend(model, readings=READINGS) as run:
        watched = tensors(model(**batch))
    assert furthest(watched, whole, batch.get("attention_mask")) <= TOLERANCE
    agree(run, calls, batch)


@FAMILIES
@pytest.mark.filterwarnings("ignore:.*attention layers were not read")
def test_a_silenced_head_changes_the_output_and_a_gain_of_one_does_not(family: Family):
    model = own_model(family)
    batch = batch_of(family, model)
    with torch.no_grad():
        plain = tensors(model(**batch))
        with hw.attend(model, readings=[hw.LogSumExp(per="head")]) as run:
            model(**batch)
        counts = Counter(row.stream for row in run.report if row.status == "reached")
        for stream in counts:
            layer = min(row.layer for row in run.report if row.stream == stream and row.status == "reached")
            for gain, changes in ((1.0, False), (0.0, True)):
                with hw.attend(model, edits=[hw.HeadGain(layer=layer, heads=[1], gain=gain, stream=stream)]):
                    edited = tensors(model(**batch))
                gap = furthest(edited, plain, batch.get("attention_mask"))
                assert (gap > 1e-4) == changes, f"{stream}:{layer} gain {gain} moved the output by {gap:.2e}"
