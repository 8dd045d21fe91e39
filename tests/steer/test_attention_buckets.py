"""Attention Buckets against one run for every base, in double precision: forward, padding, every way to generate."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import headwise as hw
from headwise import steer
from headwise.attention.waveform import ripples, rope_frequencies, rope_waveform
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.steer.choose_buckets import complementary
from tests.scan.models import bert, llama

RATIOS = (1.0, 3.0, 0.2)
IDS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
METHOD = steer.AttentionBuckets(RATIOS)


@pytest.fixture(scope="module")
def opened() -> Opened:
    opened = llama()
    opened.model.double()
    return opened


def one_by_one(opened: Opened, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[copy, batch, query, vocabulary]: the model run by itself with every base."""
    position = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for ratio in RATIOS:
        with hw.attend(opened, edits=[hw.Rebase(theta=10000.0 * ratio)]), torch.no_grad():
            found.append(opened.model(ids, attention_mask=mask, position_ids=position).logits)
    return torch.stack(found)


def blended(z: torch.Tensor, mix: str = "logits", confidence: str = "max_logit") -> tuple[torch.Tensor, torch.Tensor]:
    """The card's formulas, one place at a time."""
    out, weights = torch.zeros_like(z[0]), torch.zeros(*z.shape[1:3], len(z)).double()
    for b in range(z.shape[1]):
        for i in range(z.shape[2]):
            at = z[:, b, i]
            p = [row.softmax(0) for row in at]
            c = {
                "max_logit": [row.max() for row in at],
                "max_prob": [row.max() for row in p],
                "neg_entropy": [(row * row.log()).sum() for row in p],
            }[confidence]
            alpha = torch.tensor(c).exp() / torch.tensor(c).exp().sum()
            weights[b, i] = alpha
            mixed = sum(a * row for a, row in zip(alpha, at if mix == "logits" else p, strict=True))
            out[b, i] = mixed if mix == "logits" else mixed.log()
    return out, weights


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize("confidence", ["max_logit", "max_prob", "neg_entropy"])
def test_a_forward_is_the_mix_of_one_run_for_every_base(opened: Opened, mix: str, confidence: str) -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)}
    expected, weights = blended(one_by_one(opened, IDS, MASK), mix, confidence)
    method = steer.AttentionBuckets(RATIOS, mix, confidence)
    found, shares = method.logits(opened, batch)
    valid = MASK.bool()
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(shares[valid], weights[valid], atol=1e-6, rtol=1e-6)
    with steer.apply(opened, method), torch.no_grad():
        assert torch.equal(opened.model(**batch).logits, found)
        assert torch.equal(opened.model(IDS, **{k: v for k, v in batch.items() if k != "input_ids"})[0], found)


WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "sampling from the best": {"do_sample": True, "top_k": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_generating_is_running_every_base_by_itself_at_every_token(opened: Opened, way: str) -> None:
    ids, mask, steps = IDS, MASK, []
    for _ in range(5):
        steps.append(blended(one_by_one(opened, ids, mask)[:, :, -1:])[0][:, 0])
        ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    asked = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None} | WAYS[way]
    with steer.apply(opened, METHOD):
        found = opened.model.generate(IDS, output_logits=True, return_dict_in_generate=True, **asked)
    assert torch.equal(found.sequences, ids)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(steps).to(found.logits[0]), atol=1e-4, rtol=1e-4)


def test_beams_take_the_copies_along(opened: Opened) -> None:
    """The same beams without a cache, which nobody has to move."""
    asked = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with steer.apply(opened, METHOD):
        cached = opened.model.generate(IDS, **asked)
        assert torch.equal(cached, opened.model.generate(IDS, use_cache=False, **asked))
    assert not torch.equal(cached, opened.model.generate(IDS, **asked))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", [*WAYS, "beams"])
def test_on_a_gpu_it_is_what_it_is_on_a_cpu(way: str) -> None:
    there, asked = llama(), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "attention_mask": MASK}
    asked |= WAYS.get(way, {"num_beams": 3})
    found = []
    for device in ("cpu", "cuda"):
        there.model.to(device)
        given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in asked.items()}
        with steer.apply(there, METHOD), torch.no_grad():
            logits = there.model(IDS.to(device), attention_mask=given["attention_mask"]).logits[MASK.bool()]
            found.append((logits.cpu(), there.model.generate(IDS.to(device), **given).cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-5, rtol=1e-4)
    assert torch.equal(found[1][1], found[0][1])


def test_one_copy_with_the_models_own_base_is_the_plain_model_bit_for_bit(opened: Opened) -> None:
    single = llama()
    for model in (single, opened):
        plain = model.model(IDS).logits
        for mix in ("logits", "probs"):
            method = steer.AttentionBuckets((1.0,), mix)
            with steer.apply(model, method):
                assert torch.equal(model.model(IDS).logits, plain)
    same = steer.AttentionBuckets((1.0, 1.0, 1.0)).logits(single, {"input_ids": IDS})
    torch.testing.assert_close(same[0], single.model(IDS).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same[1], torch.full((2, 9, 3), 1 / 3))


def test_the_model_is_left_as_it_was_and_methods_stack(opened: Opened) -> None:
    plain = opened.model(IDS).logits
    parts = hw.Segments(("a", "b"), torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1, 1]]))
    scale = steer.TokenScale("b", gain=4.0)
    with pytest.raises(RuntimeError), steer.apply(opened, METHOD):
        raise RuntimeError
    assert torch.equal(opened.model(IDS).logits, plain)
    assert not opened.model._forward_hooks
    assert not opened.model._forward_pre_hooks
    alone = []
    for ratio in RATIOS:
        edits = [hw.Rebase(theta=10000.0 * ratio), *scale.edits(opened)]
        with hw.attend(opened, edits=edits, segments=parts), torch.no_grad():
            alone.append(opened.model(IDS).logits)
    with steer.apply(opened, METHOD, scale, segments=parts), torch.no_grad():
        found = opened.model(IDS).logits
    torch.testing.assert_close(found, blended(torch.stack(alone))[0], atol=1e-6, rtol=1e-6)


def test_bases_fill_each_others_troughs() -> None:
    waves = np.stack([rope_waveform(rope_frequencies(1e4 * r, 128), 400)[1:] for r in (1, 1.5, 2.0, 2.5)])
    chosen = [0]
    for _ in range(2):
        envelope = ripples(waves[chosen].max(0))
        inner = range(1, 399)
        troughs = [s for s in inner if envelope[s - 1] > envelope[s] <= envelope[s + 1]]
        far = {}
        for k in {1, 2, 3} - set(chosen):
            wave = ripples(waves[k])
            peaks = [s for s in inner if wave[s - 1] < wave[s] >= wave[s + 1]]
            far[k] = sum(min(abs(t - p) for p in peaks) for t in troughs)
        chosen.append(min(far, key=far.get))
    assert complementary(waves, 3) == chosen


def test_choosing_begins_with_the_models_own_base(opened: Opened) -> None:
    found = steer.choose_buckets(opened, n=4, span=64)
    assert found[0] == 1
    assert len(set(found)) == 4
    assert steer.choose_buckets(opened, n=2, candidates=(1.0, 7.0), span=64) == (1.0, 7.0)
    waves = [rope_waveform(rope_frequencies(1e4 * r, 8), 64)[1:] for r in found]
    assert ripples(np.max(waves, axis=0)).min() > ripples(waves[0]).min()


def test_a_recipe_keeps_it(opened: Opened, tmp_path: object) -> None:
    path = steer.Recipe.of(opened, METHOD).save(tmp_path / "recipe.json")  # type: ignore[operator]
    assert steer.Recipe.load(path).methods == (METHOD,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: steer.AttentionBuckets(()), r"ratios=.*got \(\)"),
        (lambda: steer.AttentionBuckets(("1",)), r"ratios=.*a number; got \('1',\)"),
        (lambda: steer.AttentionBuckets((1.0, -2.0)), "ratios="),
        (lambda: steer.AttentionBuckets(mix="mean"), 'mix=.*"logits" or "probs"; got \'mean\''),
        (lambda: steer.AttentionBuckets(confidence="luck"), 'confidence=.*"neg_entropy"; got .luck.'),
        (lambda: steer.choose_buckets(llama(), n=0), "n= of 1 to"),
        (lambda: steer.choose_buckets(bert()), "rotary"),
        (lambda: METHOD.logits(bert(), {"input_ids": IDS}), "needs a decoder-only language model with rotary"),
        (lambda: METHOD.logits(llama(), {"input_ids": IDS, "labels": IDS}), "labels="),
        (lambda: METHOD.logits(llama(), {}), "input_ids"),
    ],
)
def test_bad_input_is_named(make: object, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        make()  # type: ignore[operator]


def test_a_model_is_called_in_any_way(opened: Opened) -> None:
    with steer.apply(opened, METHOD), torch.no_grad():
        expected = opened.model(input_ids=IDS, attention_mask=MASK).logits
        assert torch.equal(opened.model(IDS, MASK).logits, expected)
        assert torch.equal(opened.model(IDS, MASK, return_dict=False)[0], expected)


def test_what_cannot_be_copied_is_refused(opened: Opened) -> None:
    with pytest.raises(HeadwiseError, match="copies already"), steer.apply(opened, METHOD, METHOD):
        pass
    with pytest.raises(HeadwiseError, match="copies already"), steer.apply(opened, METHOD), steer.apply(opened, METHOD):
        pass
    assert not opened.model._forward_pre_hooks
    cache = opened.model(IDS, past_key_values=DynamicCache()).past_key_values
    with steer.apply(opened, METHOD), pytest.raises(HeadwiseError, match="holds 2 rows, not 6"):
        opened.model(IDS[:, :1], past_key_values=cache)
    growing = llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(HeadwiseError, match="not the dynamic kind"), steer.apply(growing, METHOD):
        pass
