"""Matching pursuit, concept heads, and the order of items."""

import numpy as np
import pytest
import torch

import headwise as hw
from headwise import steer
from headwise.models import Opened
from tests.scan.models import bert, llama


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


def planted(noise: float) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    g = torch.Generator().manual_seed(0)
    dictionary = torch.randn(60, 24, generator=g).double()
    chosen = [5, 17, 33]
    code = torch.randn(80, 3, generator=g).double()
    h = code @ torch.nn.functional.normalize(dictionary[chosen], dim=-1)
    return h + noise * torch.randn(80, 24, generator=g).double(), dictionary, chosen


def test_planted_atoms_are_found() -> None:
    h, dictionary, chosen = planted(0.05)
    found = steer.somp(h, dictionary, 3)
    assert sorted(found.atoms.tolist()) == chosen
    assert found.explained[-1] > 0.9


def test_a_slow_reference_gives_the_same() -> None:
    h, dictionary, _ = planted(0.5)
    h = h - h.mean(0)
    unit = torch.nn.functional.normalize(dictionary, dim=-1)
    taken: list[int] = []
    residual = h
    explained = []
    for _ in range(8):
        gain = (residual @ unit.T).abs().sum(0)
        gain[taken] = -1
        taken.append(int(gain.argmax()))
        fit = torch.linalg.lstsq(dictionary[taken].T, h.T).solution.T
        residual = h - fit @ dictionary[taken]
        explained.append(1 - float((residual**2).sum() / (h**2).sum()))
    found = steer.somp(h, dictionary, 8, center=False)
    assert found.atoms.tolist() == taken
    torch.testing.assert_close(found.coefficients, fit, atol=1e-8, rtol=0)
    torch.testing.assert_close(found.explained, torch.tensor(explained, dtype=torch.float64), atol=1e-10, rtol=0)
    assert (found.explained.diff() >= 0).all()
    assert 0 <= found.explained[0] < found.explained[-1] <= 1
    assert (residual @ dictionary[taken].T).abs().max() < 1e-8


def test_a_spanning_dictionary_explains_everything_and_stops() -> None:
    h, dictionary, _ = planted(0.5)
    found = steer.somp(h, dictionary, 60, center=False)
    assert len(found.atoms) == 24
    assert found.explained[-1] == pytest.approx(1.0)


def test_one_sample_and_one_step_is_the_logit_lens() -> None:
    h, dictionary, _ = planted(0.5)
    unit = torch.nn.functional.normalize(dictionary, dim=-1)
    found = steer.somp(h[:1], dictionary, 1, center=False)
    assert int(found.atoms[0]) == int((unit @ h[0]).abs().argmax())


def test_a_head_that_writes_a_words_direction_is_its_concept_head(opened: Opened) -> None:
    words = ["pleased", "family", "house"]
    rows = steer.concept_heads.unembedding(opened)[steer.concept_tokens(opened, words)]
    site = opened.sites[1]
    before = site.W_O.detach().clone()
    with torch.no_grad():
        site.W_O[2] = torch.randn(8, len(rows), generator=torch.Generator().manual_seed(1)) @ rows
    try:
        prompts = ["the family was", "a man of", "the girls were", "he had a large"]
        scores = steer.concept_scores(opened, prompts, words)
        assert scores[1, 2] == pytest.approx(1.0, abs=1e-4)
        assert (scores <= 1 + 1e-6).all()
        assert (scores >= 0).all()
        method = steer.ConceptHeads().calibrate(opened, prompts, words, count=1)
        assert method.heads == ((1, 2),)
    finally:
        with torch.no_grad():
            site.W_O.copy_(before)


def test_rows_are_what_heads_write_where_the_model_writes_on(opened: Opened) -> None:
    prompts = ["the family was", "a man of large"]
    stacked = steer.head_rows(opened, prompts, tokens=3)
    assert stacked.shape == (6, 2, 4, 8)
    torch.testing.assert_close(steer.head_rows(opened, prompts), stacked[[0, 3]], atol=1e-5, rtol=0)
    means = stacked.view(2, 3, 2, 4, 8).mean(1)
    torch.testing.assert_close(steer.head_rows(opened, prompts, tokens=3, average=True), means, atol=1e-5, rtol=0)
    batch = opened.encode(prompts[1])
    ids = opened.model.generate(**batch, max_new_tokens=2, do_sample=False)
    with hw.attend(opened, readings=[hw.HeadOutput(what="vector")]) as run, torch.no_grad():
        opened.model(ids)
    found = torch.tensor(run.tree["text"]["head_output"].isel(sample=0).values)  # layer, head, query, channel
    torch.testing.assert_close(stacked[3:], found[:, :, -3:].permute(2, 0, 1, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(steer.head_rows(opened, prompts[1:], position=0)[0], found[:, :, 0], atol=1e-5, rtol=0)


def test_a_head_is_read_in_words_and_compared_with_the_lens(opened: Opened) -> None:
    rows = steer.head_rows(opened, ["the family was", "a man of", "the girls were", "he had a large"])
    found = steer.head_pursuit(opened, rows, steps=3, heads=[(1, 2)])
    assert (found["atom"].values[0] == -1).all()
    assert np.isnan(found["explained"].values[0]).all()
    words, whole = steer.unembedding(opened), rows[:, 1, 2] @ opened.sites[1].W_O[2].detach()
    alone = steer.somp(whole, words, 3)
    assert found["atom"].values[1, 2].tolist() == alone.atoms.tolist()
    np.testing.assert_allclose(found["explained"].values[1, 2], alone.explained)
    few = steer.head_pursuit(opened, rows, words[[5, 7]], steps=4)  # two atoms are all there are
    assert (few["atom"].values[..., :2] >= 0).all()
    assert (few["atom"].values[..., 2:] == -1).all()
    assert (few["explained"].values[..., 1] == few["explained"].values[..., 3]).all()
    lens = steer.logit_lens(opened, rows, words)
    unit = words / words.norm(dim=-1, keepdim=True)
    assert lens[1, 2] == pytest.approx(float((whole @ unit.T).abs().max(-1).values.mean()), rel=1e-5)


def test_alpha_one_is_the_plain_model_bit_for_bit(opened: Opened) -> None:
    batch = opened.encode("the family was so much pleased")
    with torch.no_grad():
        plain = opened.model(**batch).logits
        with steer.apply(opened, steer.ConceptHeads(heads=[(0, 1), (1, 2)], alpha=1.0)):
            assert torch.equal(opened.model(**batch).logits, plain)
        with steer.apply(opened, steer.ConceptHeads(heads=[(0, 1), (1, 2)], alpha=-1.0)):
            assert not torch.equal(opened.model(**batch).logits, plain)


def test_items_are_put_where_the_model_looks() -> None:
    assert steer.attn_rank([0.3, 0.1, 0.2], [5.0, 9.0, 1.0]) == [1, 2, 0]
    assert steer.attn_rank([0.2, 0.2, 0.2], [1.0, 3.0, 2.0]) == [1, 2, 0]  # a flat profile: best first
    assert steer.attn_rank([0.2, 0.1], [1.0, 1.0]) == [0, 1]
    assert steer.attn_rank([1.0], [1.0]) == [0]
    order = steer.attn_rank([0.4, 0.1, 0.2, 0.3, 0.9], [3, 1, 4, 1, 5])
    assert sorted(order) == list(range(5))


def test_bad_input(opened: Opened) -> None:
    for wrong, said in (
        (lambda: steer.somp(torch.ones(3, 4), torch.ones(2, 5), 1), "somp wants"),
        (lambda: steer.somp(torch.ones(3, 4), torch.ones(2, 4), 0), "somp wants"),
        (lambda: steer.concept_scores(opened, ["the"], ["family"]), "rows: wanted two"),
        (lambda: steer.head_rows(opened, ["the"], position=0, tokens=2), "tokens: wanted"),
        (lambda: steer.head_pursuit(bert(), torch.ones(2, 2, 4, 8)), "no unembedding"),
        (lambda: steer.ConceptHeads().calibrate(opened, ["the", "a"], ["family"], count=9), "count: wanted"),
        (lambda: steer.concept_tokens(opened, ["zzzz"]), "words: none of"),
        (lambda: steer.ConceptHeads().edits(opened), "heads="),
        (lambda: steer.attn_rank([1.0], [1.0, 2.0]), "attn_rank wants"),
        (lambda: steer.FlattenBasin(("a",), (1.0,)), "FlattenBasin wants"),
        (lambda: steer.FlattenBasin(("a", "b"), (1.0, 0.0)), "FlattenBasin wants"),
    ):
        with pytest.raises(hw.HeadwiseError, match=said):
            wrong()
