"""Task generators and the evaluation: spans that say what they name, numbers that are the model's own."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tests.scan.models import llama

import headwise as hw
from headwise import steer
from headwise.models import Opened
from headwise.study import tasks
from headwise.study.evaluate import Asked, difference, evaluate, perplexity, place_curve


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


@pytest.mark.parametrize("make", tasks.TASKS)
def test_a_seed_makes_the_same_examples_and_another_others(make) -> None:
    assert make(3, 4) == make(3, 4)
    assert make(3, 4) != make(4, 4)
    for example in make(0, 6):
        assert example.options[example.gold].strip()
        assert all(0 <= a < b <= len(example.prompt) for a, b in example.spans.values())


def test_the_gold_document_holds_the_answer_and_stands_where_it_says() -> None:
    for n, example in enumerate(tasks.documents(1, 8, items=4)):
        assert example.place == n % 4
        start, stop = example.spans[f"document {example.place + 1}"]
        assert example.options[example.gold] in example.prompt[start:stop]
        assert sum(option in example.prompt for option in example.options) == 4
    assert {e.place for e in tasks.documents(1, 8, place=2)} == {2}


def test_the_value_asked_for_follows_its_key() -> None:
    for example in tasks.key_values(2, 6, items=6):
        key = example.prompt.rsplit("key ", 1)[1].removesuffix(": value")
        assert f"key {key}: value{example.options[example.gold]}\n" in example.prompt


def test_the_receiver_is_the_one_who_does_not_give() -> None:
    for example in tasks.ioi(0, 5):
        giver = example.options[1].strip()
        assert f", {giver} gave" in example.prompt
        assert example.prompt.count(example.options[0].strip()) == 1


def test_colours_are_where_their_spans_say() -> None:
    for example in tasks.coloured_objects(0, 5):
        for n, option in enumerate(example.options):
            start, stop = example.spans[f"colour {n + 1}"]
            assert example.prompt[start:stop].capitalize() == option.strip()
        a, b = example.spans["question"]
        thing = example.prompt[a:b].removeprefix("What color is the ").removesuffix("?")
        assert f"{example.options[example.gold].strip().lower()} {thing}" in example.prompt


def test_sentiment_has_as_many_shots_as_asked() -> None:
    for example in tasks.sentiment(0, 4, shots=3):
        assert example.prompt.count("Sentiment:") == 4
        start, stop = example.spans["sentence"]
        words = tasks.GOOD if example.gold == 0 else tasks.BAD
        assert any(word in example.prompt[start:stop] for word in words)


def test_the_topic_is_that_of_the_word() -> None:
    for example in tasks.topic(0, 8, shots=2):
        assert example.prompt.count("Topic:") == 3
        start, stop = example.spans["sentence"]
        words = tasks.TOPICS[example.options[example.gold]]
        assert any(word in example.prompt[start:stop] for word in words)


def test_segments_name_the_parts_and_the_last_token(opened: Opened) -> None:
    [example] = tasks.documents(0, 1, items=3)
    segments = example.segments(opened)
    assert {"document 1", "document 2", "document 3", "question", "last"} <= set(segments.names)
    assert segments.mask("last").nonzero()[:, -1].tolist() == [segments.length - 1]


def test_evaluation_compares_the_same_examples(opened: Opened) -> None:
    examples = tasks.ioi(0, 3)
    table = evaluate(
        opened,
        examples,
        {"same": [steer.TokenScale(gain=1.0)], "more": lambda e: [steer.Emphasis("receiver", alpha=0.01)]},
    )
    assert len(table) == 9
    assert difference(table, "same") == (0, 0, 0)
    change = difference(table, "more")
    assert change.low <= change.mean <= change.high
    wanted = [float(steer.option_logprobs(opened, e)[0]) for e in examples]
    np.testing.assert_allclose(table[table["setting"] == "plain"]["logp"], wanted, atol=1e-4)


LAST_ONLY = [
    steer.Knockout("giver", queries="last"),
    steer.ForceAttention((2, 5), queries="last"),
    steer.FoundInTheMiddle(("giver", "receiver"), (0.0, 1.0)),
    steer.SplitSoftmax("giver", 0.3, queries="last"),
]
MORE = [steer.Emphasis("giver", alpha=0.01), steer.ScaleHeads(gain=0.0), steer.FocusDirections(torch.ones(2, 4, 8))]


def test_what_stands_before_the_last_token_is_read_once(opened: Opened) -> None:
    [example] = tasks.ioi(0, 1)
    asked, length = Asked(opened, example), len(opened.encode(example.prompt)["input_ids"][0])
    read = []
    hook = opened.model.register_forward_pre_hook(
        lambda m, a, k: read.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    found = [asked.scores(methods) for methods in ([], *([m] for m in LAST_ONLY), *([m] for m in MORE))]
    hook.remove()
    assert read == [length - 1, *[1] * 5, *[length] * 3]
    for method, scores in zip([*LAST_ONLY, *MORE], found[1:], strict=True):
        with steer.apply(opened, method, segments=example.segments(opened)), torch.no_grad():
            whole = opened.model(opened.encode(example.prompt)["input_ids"]).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(scores, whole[torch.stack([text[-1] for text in asked.texts])], atol=1e-4, rtol=0)


def test_options_of_several_tokens_are_steered_to_their_end(opened: Opened) -> None:
    [example] = tasks.ioi(0, 1)
    longer = replace(example, options=(" the family was", " a man of large fortune"))
    method = steer.Emphasis("receiver", alpha=0.01)
    found = Asked(opened, longer).scores([method])
    for option, score in zip(longer.options, found, strict=True):
        text = opened.encode(longer.prompt + option)["input_ids"]
        start = opened.encode(longer.prompt)["input_ids"].shape[1]
        with steer.apply(opened, method, segments=longer.segments(opened).extend(text.shape[1])), torch.no_grad():
            chances = opened.model(text).logits[0].log_softmax(-1)
        wanted = sum(chances[n - 1, text[0, n]] for n in range(start, text.shape[1]))
        assert score == pytest.approx(wanted.item(), abs=1e-4)
    assert (found - Asked(opened, longer).scores()).abs().min() > 1e-3


def test_a_score_per_byte_does_not_favour_short_options(opened: Opened) -> None:
    example = replace(
        tasks.ioi(0, 1)[0], options=(" the", " the family was so much pleased with a man of large fortune")
    )
    whole, each = (evaluate(opened, [replace(example, gold=1)], {}, per=per) for per in ("option", "byte"))
    assert whole["right"].item() == 0
    assert each["logp"].item() == pytest.approx(whole["logp"].item() / len(example.options[1]))
    assert each["right"].item() == 1


def test_the_curve_over_places_is_the_mean_at_each() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"setting": s, "example": n, "place": n % 3, "logp": rng.normal(n % 3, 0.1)}
        for n in range(60)
        for s in ("plain", "more")
    ]
    curve = place_curve(pd.DataFrame(rows)).set_index(["setting", "place"])
    for place in range(3):
        row = curve.loc["plain", place]
        wanted = np.mean([r["logp"] for r in rows if r["place"] == place and r["setting"] == "plain"])
        assert row["mean"] == pytest.approx(wanted)
        assert row["low"] < wanted < row["high"]
        assert row["count"] == 20
    with pytest.raises(hw.HeadwiseError, match="has a place"):
        place_curve(pd.DataFrame([{"setting": "plain", "example": 0, "place": None, "logp": 0.0}]))


def test_the_interval_of_a_known_change() -> None:
    rng = np.random.default_rng(0)
    change = rng.normal(1.0, 0.5, 400)
    rows = [{"setting": s, "example": n, "logp": c * (s == "b")} for n, c in enumerate(change) for s in ("plain", "b")]
    found = difference(pd.DataFrame(rows), "b")
    assert found.mean == pytest.approx(change.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)


def test_perplexity_of_a_text_is_that_of_its_windows(opened: Opened) -> None:
    text = hw.scan.needles.haystack()
    plain = perplexity(opened, text, length=32, windows=2)
    assert perplexity(opened, text, [steer.TokenScale(gain=1.0)], length=32, windows=2) == plain
    assert perplexity(opened, text, [steer.ScaleHeads(gain=0.0)], length=32, windows=2) != plain
    ids = opened.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :32]
    segments = hw.Segments.from_spans({"span": (0, 9), "tail": (20, 32)}, 32)
    method = steer.Emphasis("span", alpha=0.01)
    with steer.apply(opened, method, segments=segments), torch.no_grad():
        chances = opened.model(ids).logits[0].log_softmax(-1)
    wanted = -np.mean([chances[n - 1, ids[0, n]].item() for n in range(20, 32)])
    found = perplexity(opened, text, [method], length=32, windows=1, segments=segments, start=20)
    assert np.log(found) == pytest.approx(wanted, abs=1e-5)


def test_bad_input(opened: Opened) -> None:
    for wrong, said in (
        (lambda: tasks.documents(0, 1, items=1), "items"),
        (lambda: evaluate(opened, [], {}), "examples"),
        (lambda: evaluate(opened, tasks.ioi(0, 1), {"plain": []}), "plain"),
        (lambda: evaluate(opened, tasks.ioi(0, 1), {}, per="token"), "per"),
        (lambda: perplexity(opened, "the family"), "length"),
        (lambda: perplexity(opened, hw.scan.needles.haystack(), length=32, start=32), "start"),
        (lambda: difference(pd.DataFrame([{"setting": "plain", "example": 0, "logp": 0.0}]), "b"), "no setting 'b'"),
    ):
        with pytest.raises(hw.HeadwiseError, match=said):
            wrong()
