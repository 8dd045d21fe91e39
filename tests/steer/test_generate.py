"""Steering inside `generate()`: every cache, batches with padding, beams; segments go on as "generated"."""

import pytest
import torch

from headwise import steer
from headwise.models import Opened, Segments
from tests.scan.models import llama

IDS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
PARTS = Segments.from_spans({"first": (0, 1), "span": (2, 5)}, 9)
METHODS = (steer.TokenScale(gain=3.0), steer.Emphasis("span", alpha=0.2), steer.ScaleHeads(heads=((1, 0),), gain=0.0))


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


def uncached(opened: Opened, steps: int) -> torch.Tensor:
    """Greedy decoding by whole forwards, the segments extended by hand."""
    ids = IDS
    for _ in range(steps):
        with steer.apply(opened, *METHODS, segments=PARTS.extend(ids.shape[1])), torch.no_grad():
            ids = torch.cat([ids, opened.model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("cache", [None, "static"])
def test_steered_decoding_through_a_cache_equals_whole_forwards(opened: Opened, cache: str | None) -> None:
    kwargs = {} if cache is None else {"cache_implementation": cache}
    with steer.apply(opened, *METHODS, segments=PARTS):
        found = opened.model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, **kwargs)
    assert torch.equal(found, uncached(opened, 5))


def test_beams_are_steered(opened: Opened) -> None:
    def beams() -> torch.Tensor:
        return opened.model.generate(IDS, max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None)

    plain = beams()
    with steer.apply(opened, *METHODS, segments=PARTS):
        assert beams().shape == plain.shape
    assert torch.equal(beams(), plain)


def test_left_padding_does_not_move_the_segments(opened: Opened) -> None:
    padded = torch.cat([torch.ones(2, 3, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], 1)
    parts = Segments.from_spans({"first": (3, 4), "span": (5, 8), "pad": (0, 3)}, 12)
    method = steer.TokenScale("first", gain=3.0), steer.Emphasis("span", alpha=0.2)
    with steer.apply(opened, *method, segments=PARTS), torch.no_grad():
        plain = opened.model(IDS).logits
    with steer.apply(opened, *method, segments=parts), torch.no_grad():
        position = (mask.cumsum(1) - 1).clamp(min=0)
        moved = opened.model(padded, attention_mask=mask, position_ids=position).logits[:, 3:]
    torch.testing.assert_close(moved, plain, atol=1e-4, rtol=1e-4)
