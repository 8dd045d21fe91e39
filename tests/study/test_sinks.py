"""The studies of sinks and reference frames, end to end on small models, and their parts."""

import numpy as np
import pytest
import torch
from tests.scan.models import bert, llama

from headwise.models import open_model
from headwise.scan.reference_frames import FRAMES
from headwise.scan.secondary_sinks import SecondarySinks, SinkToken
from headwise.scan.sink_census import SinkCensus
from headwise.study.frame_emergence import frame_emergence, small_model
from headwise.study.reference_frames import (
    divergence,
    frame_origin_removed,
    frame_types,
    sentences,
)
from headwise.study.secondary_sinks import after, scaling, secondary_sink_norm, secondary_sinks_exist
from headwise.study.sink_census import later_sinks, later_sinks_harm
from headwise.study.sink_language import BOS, SinkLanguage, small_llama
from headwise.study.sink_mixing import sink_heads_idle, sink_mixing, spread
from headwise.study.sink_training import inspect, sink_context, sink_packing, token_losses

EASY = SecondarySinks(clip=False, prominence=0.01, cosine=0.3, others=8)


def test_secondary_sinks_are_described_and_scaled() -> None:
    opened = llama(num_hidden_layers=5)
    found = secondary_sinks_exist(opened, texts=2, length=24, question=EASY).measured
    assert found["texts_with_primary"] == 1
    assert found["secondary_per_text"]["0.9"] > 0
    assert found["score"] > 0
    assert sum(count for _, _, count in found["levels"]) == pytest.approx(2 * found["secondary_per_text"]["0.9"])
    norm = secondary_sink_norm(opened, texts=1, length=24, factors=(1.0, 0.0), question=EASY).measured
    assert norm["largest_change_at_factor_1"] < 1e-5
    assert norm["score"][0] != norm["score"][1]
    nothing = SecondarySinks(prominence=1e9)
    assert secondary_sinks_exist(opened, texts=1, length=24, question=nothing).verdict == "fails"
    assert secondary_sink_norm(opened, texts=1, length=24, question=nothing).verdict == "untestable"


def test_scaling_touches_only_a_sink_at_the_layer_where_it_starts() -> None:
    look = scaling([SinkToken(2, "secondary", (3, 4))], 0.5)
    x = torch.ones(1, 4, 2)
    assert look(2, x) is None
    assert look(3, x)[0, :, 0].tolist() == [1, 1, 0.5, 1]
    assert x.min() == 1, "the model's own tensor stays"
    assert after(SinkToken(2, "secondary", (3, 4)), 5) == [4]


def test_the_census_studies_measure_text_and_controls() -> None:
    opened, easy = llama(), SinkCensus(threshold=0.06)
    found = later_sinks(opened, texts=2, length=32, question=easy).measured
    assert len(found["by_layer"]) == len(found["by_layer_shuffled"]) == 2
    assert sum(found["tokens"].values()) <= 1
    harm = later_sinks_harm(opened, heads=3, texts=2, length=32, question=easy)
    assert harm.verdict in ("holds", "fails")
    assert 0 <= harm.measured["bad_share"] <= 1
    none = later_sinks_harm(opened, heads=3, texts=1, length=32, question=SinkCensus(threshold=0.99))
    assert none.verdict == "untestable"
    assert later_sinks(opened, texts=1, length=32, question=SinkCensus(threshold=0.99)).verdict == "fails"


def test_mixing_studies_measure_every_condition() -> None:
    opened = llama()
    found = sink_mixing(opened, prompts=2, length=16)
    assert set(found.measured) == {"plain", "sink_hidden", "other_hidden", "prompts_with_more"}
    same = torch.arange(4, 16).expand(2, -1)
    assert spread(opened, same, 3, None) == 0
    assert spread(opened, same, 3, 0) == 0
    idle = sink_heads_idle(opened, texts=2, length=16, layers=2).measured
    assert set(idle["rise"]) == {"resting", "working", "random"}
    assert any(value != 0 for value in idle["draws"]["working"])


def test_hiding_a_token_changes_the_predictions_of_later_ones_only() -> None:
    opened = llama()
    batch = {"input_ids": torch.arange(4, 16)[None]}
    found = divergence(opened, batch, 4)
    assert (found[:5].abs() < 1e-5).all(), "earlier queries and the token itself see all they saw"
    assert (found[5:] > 0).all()
    found = frame_origin_removed(opened, texts=3)
    assert found.measured["texts"] == 3
    lengths = [b["input_ids"].shape[1] for b in sentences(opened, 5, least=12)]
    assert all(12 <= n <= 50 for n in lengths)


def test_frame_types_measure_both_models_against_uniform_attention() -> None:
    found = frame_types(llama(), bert(), vision=None, texts=4)
    assert found.verdict == "fails", "random models have no such origin"
    assert {found.measured[name]["frame"] for name in ("decoder", "encoder")} <= set(FRAMES)
    assert found.measured["encoder"]["fiedler_uniform"] == pytest.approx(1)


def test_the_language_copies_after_triggers_and_shows_its_beginning_token_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    language = SinkLanguage(length=40, rows=8)
    ids, document = language.window(generator)
    assert document.tolist() == [0] * 40
    assert ids.min() > BOS
    before, here, after_ = ids[:, :-2], ids[:, 1:-1], ids[:, 2:]
    trigger = here - 1 < language.triggers
    assert (after_ == before)[trigger].all()
    assert not (after_ == before)[~trigger].all()
    two = SinkLanguage(length=40, rows=8, documents=2, bos="between", mask="document")
    ids, document = two.window(generator)
    assert (ids == BOS).any(0).nonzero().flatten().tolist() == [20]
    assert (SinkLanguage(length=40, documents=2, bos="fixed").window(generator)[0] == BOS).any(0).nonzero().item() == 0
    mask = two(generator)["attention_mask"]
    assert mask[0, 0, 25, 3] < -1e30
    assert mask[0, 0, 25, 21] == mask[0, 0, 15, 3] == 0


def test_hidden_documents_do_not_reach_the_later_ones() -> None:
    language = SinkLanguage(length=16, rows=2, documents=2, mask="document")
    model = small_llama(language).eval()
    batch = language(torch.Generator().manual_seed(1))
    mask, ids = batch["attention_mask"], batch["input_ids"]
    changed = ids.clone()
    changed[:, :8] = ids[:, :8].flip(1)
    with torch.no_grad():
        one, two = (model(input_ids=x, attention_mask=mask).logits for x in (ids, changed))
        assert token_losses(model, ids, {"attention_mask": mask}).shape == (2, 15)
    torch.testing.assert_close(one[:, 8:], two[:, 8:])
    assert {"first", "second_document", "loss", "rise"} == set(inspect(model, language, 3))


def test_training_studies_run_on_few_steps() -> None:
    packing = sink_packing(seeds=[0], steps=2, length=16).measured
    assert set(packing) == {f"{b}_{m}" for b in ("none", "between", "fixed") for m in ("causal", "document")}
    context = sink_context(seeds=[0], lengths=(8, 16), steps=2)
    assert context.verdict == "fails", "two steps teach nothing"
    emergence = frame_emergence(seeds=[0], steps=20, schemes=("rope", "rope_scaled", "two_way"))
    assert [run["scheme"] for run in emergence.measured["runs"]] == ["rope", "rope_scaled", "two_way"]
    assert all(np.isfinite(run["anchor"]).all() for run in emergence.measured["runs"])


def test_schemes_differ_in_their_positions() -> None:
    plain, _ = small_model("rope", 0)
    scaled, _ = small_model("rope_scaled", 0)
    encoder, draw = small_model("two_way", 0)
    ids = draw(torch.Generator().manual_seed(0))
    assert (ids["labels"][:, [0, -1]] == -100).all()
    assert [site.stream for site in open_model(encoder).sites] == ["text"]
    with torch.no_grad():
        one, two = (model.eval()(input_ids=torch.arange(1, 9)[None]).logits for model in (plain, scaled))
    assert not torch.allclose(one, two), "the same weights, other positions"
