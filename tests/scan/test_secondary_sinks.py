"""Secondary sinks: planted copies are found with their level, and the scores are what later queries give."""

import numpy as np
import pytest
import torch

from headwise import scan
from headwise.attention import Map, attend
from headwise.errors import HeadwiseError
from headwise.scan.secondary_sinks import SecondarySinks, directions, lifespan
from tests.scan.models import llama

LAYERS, TOKENS, WIDTH = 12, 20, 64


def planted(places: dict[int, tuple[int, int]], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Norms and cosines of random hidden states whose first token is large in layers 2 to 10, with copies of it at
    `places` in the layers from a to b - 1."""
    h = np.random.default_rng(seed).normal(size=(LAYERS, TOKENS, WIDTH))
    h[2:11, 0] *= 50
    for token, (a, b) in places.items():
        h[a:b, token] = h[a:b, 0]
    norm = np.linalg.norm(h, axis=-1)
    cosine = np.einsum("lcd,ltd->lct", h[:, :2], h) / (norm[:, :2, None] * norm[:, None])
    return norm, cosine


def test_planted_copies_are_found_with_start_and_lifetime() -> None:
    found, span = SecondarySinks().find(*planted({7: (4, 8), 12: (3, 4), 15: (2, 11)}))
    assert span == (2, 11)
    assert {s.position: (s.kind, s.start, s.lifetime) for s in found} == {
        0: ("primary", 2, 9),
        7: ("secondary", 4, 4),
        12: ("noise", 3, 1),
        15: ("primary", 2, 9),
    }


def test_the_clip_hides_what_lies_outside_and_can_be_left_off() -> None:
    states = planted({7: (0, 2)})
    assert [s.position for s in SecondarySinks().find(*states)[0]] == [0]
    found, span = SecondarySinks(clip=False).find(*states)
    assert span == (0, LAYERS)
    assert [(s.position, s.layers) for s in found[1:]] == [(7, (0, 1))]


def test_an_opposite_direction_counts_and_the_candidates_do_not() -> None:
    norm, cosine = planted({1: (4, 8), 7: (4, 8)})
    cosine[:, 0, 7] *= -1
    assert [s.position for s in SecondarySinks().find(norm, cosine)[0]] == [0, 7]


def test_without_a_first_token_that_stands_out_there_is_no_sink() -> None:
    norm, cosine = planted({7: (4, 8)})
    assert SecondarySinks().find(np.ones_like(norm), cosine)[0] == []


def test_the_rule_of_the_paper_counts_layers() -> None:
    rule = SecondarySinks(rule="layers")
    assert [rule.label(n, 40, 48) for n in (4, 5, 32, 33)] == ["noise", "secondary", "secondary", "primary"]


def test_the_lifespan_goes_from_the_jump_to_the_fall() -> None:
    assert lifespan(np.array([1.0, 1, 50, 51, 52, 3, 2])) == (2, 5)
    assert lifespan(np.array([1.0, 2, 9])) == (2, 3), "it never falls"
    assert lifespan(np.array([5.0])) == (0, 1)


def test_directions_are_those_of_the_hidden_states() -> None:
    opened = llama(num_hidden_layers=3)
    batch = {"input_ids": torch.arange(4, 14)[None]}
    norms, cosines = directions(opened, batch, 2)
    with torch.no_grad():
        states = opened.model(**batch, output_hidden_states=True).hidden_states[1:3]
    for layer, h in enumerate(states):  # the list's last entry has passed the final norm
        np.testing.assert_allclose(norms[layer, 0], h[0].norm(dim=-1), rtol=1e-5)
        np.testing.assert_allclose(cosines[layer, 0, 1], torch.cosine_similarity(h[0], h[0, 1:2], dim=-1), atol=1e-5)


def test_scores_and_profiles_of_a_real_forward_pass() -> None:
    opened = llama(num_hidden_layers=5)
    ids = torch.arange(4, 24)
    question = SecondarySinks(clip=False, prominence=0.01, cosine=0.3, others=5)
    result = scan.heads(opened, inputs=[{"input_ids": ids[None]}], questions=[question])
    tokens = scan.secondary_sink_tokens(opened, inputs=[{"input_ids": ids[None]}], question=question)
    chosen = tokens[tokens["kind"] == "secondary"]
    assert len(chosen) > 0
    with attend(opened, readings=[Map()]) as run, torch.no_grad():
        opened.model(input_ids=ids[None])
    weights = run.tree["text"]["map"].values[0]
    scores = np.stack([weights[:, :, j + 1 :, j].mean(-1) for j in chosen["position"] if j < 19])
    np.testing.assert_allclose(result.heads["secondary_sinks"], scores.sum(0).ravel(), atol=1e-5)
    count = result.data["sink_count"].sel(stream="text")
    assert float(count.sum()) == 20
    assert float(count.sel(kind="secondary")) == len(chosen) == float(result.data["sink_levels"].sum())
    depth = result.data["sink_depth"].sel(stream="text", kind="secondary")
    np.testing.assert_allclose(depth, scores.sum(0).mean(-1), atol=1e-5)
    row = chosen.iloc[0]
    assert row["layers"][0] == row["start"]
    assert row["score"] == pytest.approx(
        np.mean([weights[layer, :, row["position"] + 1 :, row["position"]].mean() for layer in row["layers"]]), abs=1e-5
    )


@pytest.mark.parametrize("wrong", [{"cosine": 1.0}, {"rule": "paper"}, {"candidates": 0}, {"others": 0}])
def test_bad_options_name_themselves(wrong: dict) -> None:
    with pytest.raises(HeadwiseError, match=next(iter(wrong))):
        SecondarySinks(**wrong)


def test_padding_is_refused() -> None:
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    with pytest.raises(HeadwiseError, match="without padding"):
        scan.heads(llama(), inputs=[batch], questions=[SecondarySinks()])
