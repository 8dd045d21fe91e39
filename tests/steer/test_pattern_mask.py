"""Patterns injected into heads, against the plain model's weights; emphasis and knockout with any form of mask."""

import math

import pytest
import torch

import headwise as hw
from headwise import steer
from headwise.attention.call import AttentionCall
from headwise.attention.edits import ScoreBias
from headwise.attention.effects import resolve
from headwise.attention.stream import stream
from headwise.models import Opened, Segments
from headwise.steer.pattern_mask import MatchingTokens, Offset, PatternMask
from tests.scan.models import bert, llama

IDS = torch.tensor([[3, 7, 9, 7, 4, 3, 11, 9, 9, 5, 7, 12]])
PARTS = Segments.from_spans({"one": (0, 4), "two": (4, 9), "three": (9, 12)}, 12)
N = 12
PLACE = torch.arange(N)
SAME_TOKEN = (IDS[0][:, None] == IDS[0]) & (PLACE[:, None] != PLACE)
PATTERNS = {
    "previous": ("previous", PLACE[:, None] - PLACE == 1),
    "offset": ("offset:-3", PLACE[:, None] - PLACE == 3),
    "matching": (MatchingTokens(IDS), SAME_TOKEN),
    "matching, some left out": (MatchingTokens(IDS[0], exclude=(9,)), SAME_TOKEN & (IDS[0] != 9)),
    "same segment": ("same", PARTS.labels[:, None] == PARTS.labels),
    "separators": ("two", (PARTS.labels == 1).expand(N, N)),
    "bools": (IDS[0] == 7, (IDS[0] == 7).expand(N, N)),
    "rule": (lambda b, h, i, j: (i + j) % 3 == 0, (PLACE[:, None] + PLACE) % 3 == 0),
    "window": ("window:2", (PLACE[:, None] - PLACE).abs() <= 2),
}


@pytest.fixture(scope="module", params=[llama, bert], ids=["causal", "both ways"])
def opened(request: pytest.FixtureRequest) -> Opened:
    found = request.param()
    found.model.double()
    return found


def weights(opened: Opened, *methods: steer.Method, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The maps of layer 0: [head, query, key]."""
    edits = [edit for method in methods for edit in method.edits(opened)]
    with hw.attend(opened, readings=[hw.Map(layers=0)], edits=edits, segments=PARTS) as run, torch.no_grad():
        opened.model(ids)
    return torch.tensor(run.tree["text"]["map"].values[0, 0]).double()


@pytest.mark.parametrize("mode", ["mask", "fix"])
@pytest.mark.parametrize("name", PATTERNS)
def test_heads_keep_to_the_pattern(opened: Opened, name: str, mode: str) -> None:
    pattern, holds = PATTERNS[name]
    a = weights(opened)
    seen = (a > 0).double()
    source = a[1] if mode == "mask" else seen[1]
    inside = source * holds
    alone = inside.sum(-1, keepdim=True) == 0  # no key of the pattern in sight: as if there were none
    wanted = torch.where(alone, source, inside)
    wanted /= wanted.sum(-1, keepdim=True)
    found = weights(opened, PatternMask(pattern, heads=((0, 1),), mode=mode))
    torch.testing.assert_close(found[1], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[[0, 2, 3]], a[[0, 2, 3]], atol=1e-12, rtol=0)


def test_a_pattern_of_everything_changes_nothing(opened: Opened) -> None:
    found = weights(opened, PatternMask(torch.ones(N, dtype=torch.bool)))
    torch.testing.assert_close(found, weights(opened), atol=1e-6, rtol=0)


def test_a_fixed_offset_hands_on_the_value_of_that_place() -> None:
    opened = llama()
    readings = [hw.HeadOutput(what="vector", layers=0), hw.Inputs(("v",), layers=0)]
    edits = PatternMask("previous", mode="fix").edits(opened)
    with hw.attend(opened, readings=readings, edits=edits) as run, torch.no_grad():
        opened.model(IDS)
    z, v = (torch.tensor(run.tree["text"][name].values[0, 0]) for name in ("head_output", "input_v"))
    torch.testing.assert_close(z[:, 1:], v[:, :-1], atol=1e-6, rtol=0)
    torch.testing.assert_close(z[:, 0], v[:, 0], atol=1e-6, rtol=0)  # which has none before it: it sees itself


def test_patterns_of_several_heads_stack_and_queries_are_chosen() -> None:
    opened = llama()
    both = PatternMask("previous", heads=((0, 0),), mode="fix"), PatternMask("same", heads=((0, 1),), queries="three")
    a, found = weights(opened), weights(opened, *both)
    torch.testing.assert_close(found[0, 1:].diagonal(0, 0, 1), torch.ones(11).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1, :9], a[1, :9], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1, 9:, :9], torch.zeros(3, 9).double(), atol=1e-6, rtol=0)


def test_a_later_token_cannot_be_a_causal_models_pattern() -> None:
    for pattern in ("next", "offset:+2", Offset(1)):
        assert PatternMask(pattern).lacks(bert()) is None
        with pytest.raises(hw.HeadwiseError, match="later tokens"), steer.apply(llama(), PatternMask(pattern)):
            pass


@pytest.mark.parametrize("beams", [1, 2])
def test_patterns_of_tokens_go_on_through_generation(beams: int) -> None:
    opened = llama()
    ids = torch.cat([IDS, IDS.flip(1)])
    methods = PatternMask(MatchingTokens(ids), heads=((0, 1), (1, 2))), PatternMask("offset:-2", heads=((0, 0),))
    with steer.apply(opened, *methods):
        kwargs = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": beams}
        cached = opened.model.generate(ids, **kwargs)
        again = opened.model.generate(ids, use_cache=False, **kwargs)
    assert torch.equal(cached, again)


def test_what_is_generated_is_a_segment_of_its_own() -> None:
    opened, method = llama(), PatternMask("same", heads=((0, 1), (1, 0)))
    with steer.apply(opened, method, segments=PARTS):
        found = opened.model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids = IDS
    for _ in range(4):
        with steer.apply(opened, method, segments=PARTS.extend(ids.shape[1])), torch.no_grad():
            ids = torch.cat([ids, opened.model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


def test_beams_keep_to_their_own_samples_tokens() -> None:
    rule = MatchingTokens(torch.tensor([[1, 2, 1], [3, 4, 5]]))
    b, place = torch.arange(4)[:, None, None, None], torch.arange(3)
    found = rule(b, torch.tensor(0), place[:, None], place)
    assert found.flatten(1).sum(1).tolist() == [2, 2, 0, 0]


def test_no_rule_is_asked_for_the_whole_matrix() -> None:
    asked = []

    def rule(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        asked.append(i.numel() * j.numel())
        return i - j == 1

    call = AttentionCall(*torch.randn(3, 1, 1, 8192, 4), scale=0.5)
    stream(resolve(call, [(ScoreBias(256.0, keys=rule), [0])]), [])
    assert max(asked) * 64 <= 8192**2


def test_emphasis_takes_any_form_of_mask() -> None:
    opened = llama()
    a = weights(opened)
    for keys, holds in PATTERNS.values():
        share = torch.where(holds, 1.0, 0.2).double()
        wanted = a * share / (a * share).sum(-1, keepdim=True)
        torch.testing.assert_close(weights(opened, steer.Emphasis(keys, alpha=0.2)), wanted, atol=1e-6, rtol=0)


def test_knockout_cuts_all_edges_between_segments() -> None:
    opened = llama()
    cut = steer.Knockout(("one", "two"), queries=("three",))
    a, found = weights(opened), weights(opened, cut)
    torch.testing.assert_close(found[:, :9], a[:, :9], atol=1e-6, rtol=0)
    assert (found[:, 9:, :9] == 0).all()
    edges = steer.Knockout(lambda b, h, i, j: (i >= 9) & (j < 9))
    torch.testing.assert_close(weights(opened, edges), found, atol=1e-7, rtol=0)
    two = weights(opened, steer.Knockout("one", queries=("two", "three")))
    assert (two[:, 4:, :4] == 0).all()
    assert (two[:, :4] == a[:, :4]).all()
    bools = weights(opened, steer.Knockout(IDS == 7))
    assert (bools[..., IDS[0] == 7][:, 1:] == 0).all()


def test_a_pattern_by_name_and_bools_are_kept_in_a_recipe(tmp_path) -> None:
    opened = llama()
    methods = PatternMask("offset:-2", heads=((0, 1),), mode="fix"), steer.Emphasis(IDS[0] == 7, alpha=0.1)
    steer.Recipe.of(opened, *methods).save(tmp_path / "recipe.json")
    again = steer.Recipe.load(tmp_path / "recipe.json").methods
    assert torch.equal(weights(opened, *again), weights(opened, *methods))


@pytest.mark.parametrize(
    "wrong,said",
    [
        (lambda: PatternMask("previous", mode="blend"), r"PatternMask\(mode"),
        (lambda: PatternMask(3), r"PatternMask\(pattern"),
        (lambda: MatchingTokens([1, 2]), r"MatchingTokens\(ids"),
        (lambda: steer.Knockout(()), "at least one segment"),
        (lambda: weights(llama(), PatternMask("sentence")), "no segment 'sentence'"),
        (lambda: weights(llama(), PatternMask("offset:x")), "no segment 'offset:x'"),
    ],
)
def test_bad_patterns_say_what_was_wanted(wrong, said: str) -> None:
    with pytest.raises(hw.HeadwiseError, match=said):
        wrong()


def test_bias_of_minus_infinity_by_a_rule_needs_no_matrix() -> None:
    call = AttentionCall(*torch.randn(3, 1, 1, 20, 4), scale=0.5)
    out, _ = stream(resolve(call, [(ScoreBias(-math.inf, keys=lambda b, h, i, j: j > i), [0])]), [])
    wanted = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, is_causal=True, scale=0.5)
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=0)
