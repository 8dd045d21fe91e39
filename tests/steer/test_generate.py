"""Steering inside `generate()`: every cache, batches with padding, beams, streams; segments go on as "generated"."""

from threading import Thread

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import headwise as hw
from headwise import steer
from headwise.models import Opened, Segments
from tests.scan.models import llama, tokenizer

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


def test_beams_through_a_cache_are_those_of_whole_forwards(opened: Opened) -> None:
    asked = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with steer.apply(opened, METHODS[0], METHODS[2]):
        cached = opened.model.generate(IDS, **asked)
        assert torch.equal(cached, opened.model.generate(IDS, use_cache=False, **asked))
    assert not torch.equal(cached, opened.model.generate(IDS, **asked))


@pytest.mark.parametrize("asked", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_segments_stay_where_they_are_without_a_cache(opened: Opened, asked: dict) -> None:
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1} | asked
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    parts = Segments.from_spans({"pad": (0, 2), "first": (2, 3), "span": (4, 7)}, 9)
    for batch, segments in (({}, PARTS), ({"attention_mask": mask}, parts)):
        with steer.apply(opened, *METHODS, segments=segments):
            cached = opened.model.generate(IDS, **batch, **asked)
            again = opened.model.generate(IDS, use_cache=False, **batch, **asked)
        assert torch.equal(again, cached)
        assert not torch.equal(again, opened.model.generate(IDS, use_cache=False, **batch, **asked))


def test_segments_of_another_text_are_refused(opened: Opened) -> None:
    other = torch.cat([IDS.flip(1), IDS[:, :1]], 1)
    with steer.apply(opened, *METHODS, segments=PARTS), torch.no_grad():
        with pytest.raises(hw.HeadwiseError, match="labels for 9 tokens, but the input has 10"):
            opened.model(torch.cat([IDS, IDS[:, :1]], 1))  # its prompt was never read
        opened.model(IDS)
        opened.model(torch.cat([IDS, IDS[:, :1]], 1))
        for wrong, length in ((other, 10), (IDS[:, :8], 8), (other[:1], 10)):
            with pytest.raises(hw.HeadwiseError, match=f"the input has {length}"):
                opened.model(wrong)


class Kept(BaseStreamer):
    """Every token as it comes."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ids.append(-1)


@pytest.mark.parametrize("methods", [METHODS, (steer.AttentionBuckets((0.2, 0.1)),)], ids=["edits", "buckets"])
def test_streaming_gives_the_same_tokens_one_by_one(opened: Opened, methods: tuple) -> None:
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    kept, text = Kept(), TextIteratorStreamer(opened.tokenizer, skip_prompt=True, timeout=60)
    with steer.apply(opened, *methods, segments=PARTS):
        whole = opened.model.generate(IDS[:1], **asked)[0]
        opened.model.generate(IDS[:1], streamer=kept, **asked)
        # The usual way to stream text: generate() in a thread of its own.
        worker = Thread(target=opened.model.generate, args=(IDS[:1],), kwargs={"streamer": text, **asked})
        worker.start()
        read = "".join(text)
        worker.join()
    assert kept.ids == [*whole.tolist(), -1]
    assert read == opened.decode(whole[9:])
    assert not torch.equal(whole, opened.model.generate(IDS[:1], **asked)[0])


def test_a_padded_batch_writes_what_each_prompt_writes_alone(opened: Opened) -> None:
    short, long = IDS[0, :6], IDS[1]
    parts = [Segments.from_spans({"first": (0, 1), "span": (2, 5)}, len(ids)) for ids in (short, long)]
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    alone = []
    for ids, part in zip((short, long), parts, strict=True):
        with steer.apply(opened, *METHODS, segments=part):
            alone.append(opened.model.generate(ids[None], **asked)[0, len(ids) :])
    batch = torch.stack([torch.cat([torch.ones(3, dtype=torch.long), short]), long])
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    for cache in (None, "static"):
        with steer.apply(opened, *METHODS, segments=Segments.stack(parts, left=True)):
            found = opened.model.generate(batch, attention_mask=mask, cache_implementation=cache, **asked)[:, 9:]
        assert torch.equal(found, torch.stack(alone))


@pytest.mark.parametrize("side", ["left", "right"])
def test_segments_are_cut_with_a_text_that_is_cut(opened: Opened, side: str) -> None:
    words = [opened.tokenizer.convert_ids_to_tokens(int(n)) for n in range(20, 32)]
    text = " ".join(words)
    start, end = text.index(words[4]), text.index(words[7])
    known = tokenizer()
    before, known.truncation_side = known.truncation_side, side
    try:
        cut = known(text, truncation=True, max_length=8, add_special_tokens=False, return_offsets_mapping=True)
    finally:
        known.truncation_side = before
    parts = Segments.from_characters(text, {"span": (start, end - 1)}, cut)
    gone = 0 if side == "right" else len(words) - 8
    ids = torch.tensor([cut["input_ids"]])
    by_hand = Segments.from_spans({"span": (4 - gone, 7 - gone)}, 8)
    logits = []
    for segments in (parts, by_hand):
        with steer.apply(opened, steer.TokenScale("span", gain=3.0), segments=segments), torch.no_grad():
            logits.append(opened.model(ids).logits)
    assert torch.equal(*logits)
    assert (logits[0] - opened.model(ids).logits).abs().max() > 1e-4


def test_the_first_token_of_a_padded_batch_is_each_samples_own(opened: Opened) -> None:
    method, short, long = steer.TokenScale(gain=5.0), IDS[0, :6], IDS[1]
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    ids = torch.stack([torch.cat([torch.ones(3, dtype=torch.long), short]), long])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9])}
    with steer.apply(opened, method):
        alone = [opened.model.generate(one[None], **asked)[0, len(one) :] for one in (short, long)]
        with pytest.raises(hw.HeadwiseError, match="padded on the left"):
            opened.model.generate(**batch, **asked)
    with steer.apply(opened, method, segments=steer.mark_first(batch)):
        found = opened.model.generate(**batch, **asked)[:, 9:]
    assert torch.equal(found, torch.stack(alone))
    assert not torch.equal(found, opened.model.generate(**batch, **asked)[:, 9:])
    both = steer.mark_first(batch, steer.mark_last(batch))
    assert both.mask("first").int().argmax(1).tolist() == [3, 0]
    assert both.mask("last").int().argmax(1).tolist() == [8, 8]


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
