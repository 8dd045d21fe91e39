"""Segments: every way to build them, and what they refuse."""

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.models import Opened, Segments

from .tiny import llama, word_tokenizer


def named(segments: Segments) -> list[str]:
    return [segments.names[i] for i in segments.labels.tolist()]


def test_spans():
    segments = Segments.from_spans({"a": (0, 2), "b": [(3, 4), (5, 6)]}, length=6)
    assert named(segments) == ["a", "a", "rest", "b", "rest", "b"]
    assert list(segments) == ["a", "b", "rest"]
    assert len(segments) == 3
    assert segments.length == 6
    assert segments.index("b") == 1
    assert segments.mask("b").tolist() == [False, False, False, True, False, True]
    assert "b" in segments
    assert str(segments).splitlines()[2].split() == ["b", "2", "3,", "5"]


def test_a_full_cover_has_no_rest():
    assert list(Segments.from_spans({"all": (0, 3)}, length=3)) == ["all"]


@pytest.mark.parametrize(
    ("spans", "word"),
    [({"a": (0, 9)}, "does not fit"), ({"a": (0, 2), "b": (1, 3)}, "overlaps"), ({"self": (0, 1)}, "relative")],
)
def test_bad_spans(spans, word):
    with pytest.raises(HeadwiseError, match=word):
        Segments.from_spans(spans, length=4)


def test_bad_labels():
    with pytest.raises(HeadwiseError, match="numbers from 0 to 0"):
        Segments(("a",), torch.tensor([0, 1]))
    with pytest.raises(HeadwiseError, match="whole numbers"):
        Segments(("a",), torch.tensor([0.0]))
    with pytest.raises(HeadwiseError, match="name of its own"):
        Segments(("a", "a"), torch.tensor([0]))


def test_wrong_length_and_unknown_name():
    segments = Segments.positions(4)
    assert named(segments) == ["first", "rest", "rest", "rest"]
    assert segments.validate(4) is segments
    with pytest.raises(HeadwiseError, match="labels for 4 tokens, but the input has 5"):
        segments.validate(5)
    with pytest.raises(HeadwiseError, match="'image' is not there"):
        segments.index("image")


def test_extend():
    segments = Segments.positions(2).extend(4).extend(5)
    assert named(segments) == ["first", "rest", "generated", "generated", "generated"]
    assert segments.extend(3) is segments
    batch = Segments(("a",), torch.zeros(2, 3, dtype=torch.long)).extend(4)
    assert batch.labels.tolist() == [[0, 0, 0, 1]] * 2


def test_characters():
    text = "the cat sat on the mat"
    segments = Segments.from_characters(text, {"cat": (4, 7), "end": (12, 22)}, word_tokenizer())
    assert named(segments) == ["rest", "cat", "rest", "end", "end", "end"]
    with pytest.raises(HeadwiseError, match="does not fit"):
        Segments.from_characters(text, {"cat": (4, 99)}, word_tokenizer())


def test_characters_from_an_encoding():
    encoding = word_tokenizer()("the cat sat", return_offsets_mapping=True)
    assert named(Segments.from_characters("the cat sat", {"cat": (4, 7)}, encoding)) == ["rest", "cat", "rest"]


def test_chat():
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
    inputs, segments = Segments.from_chat(word_tokenizer(), messages, add_generation_prompt=True)
    assert inputs["input_ids"].shape == (1, segments.length)
    frame = ["template"] * 2
    assert named(segments) == [*frame, "system", "system", "template", *frame, "user", "user", "template", *frame]
    again = [*messages, {"role": "assistant", "content": "you"}, {"role": "user", "content": "hello there"}]
    _, segments = Segments.from_chat(word_tokenizer(), again)
    assert int(segments.mask("user").sum()) == 4


def test_chat_without_a_template():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(HeadwiseError, match="no chat template"):
        Segments.from_chat(tokenizer, [{"role": "user", "content": "hello"}])
    with pytest.raises(HeadwiseError, match="empty conversation"):
        Segments.from_chat(word_tokenizer(), [])


def test_documents():
    inputs, segments = Segments.from_documents(
        word_tokenizer(), ["the cat", "a dog ran"], before="be brief", after="who ran"
    )
    assert named(segments) == (["before"] * 2 + ["document 1"] * 2 + ["document 2"] * 3 + ["after"] * 2)
    assert inputs["input_ids"].shape == (1, 9)
    with pytest.raises(HeadwiseError, match="no text"):
        Segments.from_documents(word_tokenizer(), [])


def test_special():
    ids = torch.tensor([[1, 5, 6, 2], [3, 3, 1, 7]])
    segments = Segments.from_special(word_tokenizer(), ids)
    rows = [[segments.names[i] for i in row] for row in segments.labels.tolist()]
    assert rows == [["bos", "rest", "rest", "eos"], ["pad", "pad", "bos", "rest"]]


def test_processor():
    class Processor:
        tokenizer = word_tokenizer()
        image_token = "<image>"

    inputs = {"input_ids": torch.tensor([[1, 4, 4, 6]])}
    segments = Segments.from_processor(Processor(), inputs)
    assert [segments.names[i] for i in segments.labels[0].tolist()] == ["bos", "image", "image", "text"]
    with pytest.raises(HeadwiseError, match="no image"):
        Segments.from_processor(word_tokenizer(), inputs)


def test_stack_pads_on_either_side():
    one, two = Segments.positions(2), Segments.from_spans({"q": (0, 3)}, 3)
    right = Segments.stack([one, two])
    assert [right.names[i] for i in right.labels[0].tolist()] == ["first", "rest", "pad"]
    left = Segments.stack([one, two], left=True)
    assert [left.names[i] for i in left.labels[0].tolist()] == ["pad", "first", "rest"]


def test_default_segments_name_the_padding():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "</s>"  # as many chat models do
    opened = Opened(llama(), tokenizer, None, [], "tiny")
    batch = opened.encode(["the cat sat on", "hello"])
    segments = opened.segments(batch)
    assert [segments.names[i] for i in segments.labels[1].tolist()] == ["pad", "pad", "pad", "text"]
    assert "eos" not in segments
