"""What a cache keeps, token by token: as if everything were joined anew each time."""

import copy

import pytest
import torch

from headwise.swap.cache import Cache, Entries

PARTS = torch.randn(40, 2, 3, 1, 4, generator=torch.Generator().manual_seed(0))


def joined(parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(parts), -2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_tokens_are_appended(mode: type) -> None:
    entries = Entries()
    with mode():
        for n, part in enumerate(PARTS, 1):
            (kept,) = entries.extend(k=part)
            assert torch.equal(kept, joined(PARTS[:n]))


def test_the_room_is_made_a_few_times_only() -> None:
    entries, places = Entries(), set()
    with torch.no_grad():
        for part in PARTS:
            entries.extend(k=part)
            places.add(entries.grown["k"].data_ptr())
    assert len(places) <= 4


def test_what_a_backward_pass_needs_is_not_written_to() -> None:
    entries = Entries()
    first = PARTS[0].clone().requires_grad_()
    loss = torch.zeros(())
    for part in (first, *PARTS[1:5]):
        (kept,) = entries.extend(k=part)
        loss = loss + kept.square().sum()
    loss.backward()
    torch.testing.assert_close(first.grad, 2 * 5 * PARTS[0])


def test_two_modes_one_cache() -> None:
    entries = Entries()
    for n, part in enumerate(PARTS, 1):
        with (torch.no_grad, torch.inference_mode, torch.enable_grad)[n // 3 % 3]():
            (kept,) = entries.extend(k=part)
            assert torch.equal(kept, joined(PARTS[:n]))


def test_cropped_moved_and_copied_caches_stay_apart() -> None:
    module, cache = torch.nn.Identity(), Cache()
    entries = cache.of(module)
    with torch.no_grad():
        for part in PARTS[:10]:
            entries.extend(k=part)
            entries.length += 1
        other = copy.deepcopy(entries)
        cache.crop(6)
        (kept,) = entries.extend(k=PARTS[20])
        assert torch.equal(kept, joined(PARTS[[*range(6), 20]]))
        (theirs,) = other.extend(k=PARTS[21])
        assert torch.equal(theirs, joined(PARTS[[*range(10), 21]]))
        cache.reorder(torch.tensor([1, 1]))
        (kept,) = entries.extend(k=PARTS[22])
        assert torch.equal(kept[:, :, :7], joined(PARTS[[*range(6), 20]])[[1, 1]])
        assert torch.equal(kept[:, :, 7:], PARTS[22])
