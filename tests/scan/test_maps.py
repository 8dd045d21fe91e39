"""Relations and salient operations from weights alone, against full matrices and heads made for one relation."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from headwise import scan
from headwise.attention import HeadOutput, Inputs, ScoreBias, attend
from headwise.errors import HeadwiseError
from headwise.models import Segments, open_model
from headwise.scan.maps_relations import static_hits
from headwise.scan.maps_salient import Mapping, describe_rules, salient_mappings, salient_prompt
from headwise.scan.norms import gain, norms_before, removes_mean
from headwise.scan.token_maps import after_first_mlp, embedded, token_map
from headwise.scan.word_pairs import relations, single_tokens, word_token
from tests.scan.models import InductionCircuit, bert, circuit, llama, tokenizer

WORDS = (
    "house man woman father mother sister daughter husband wife family day year love hope good great new old".split()
)
PAIRS = list(itertools.pairwise(WORDS))


def test_first_mlp_is_the_blocks_own_norm_and_mlp_without_the_token_itself() -> None:
    opened = llama()
    block = opened.model.model.layers[0]
    ids = torch.tensor([5, 6, 900])
    with torch.no_grad():
        block.post_attention_layernorm.weight.mul_(torch.linspace(0.5, 2, 32))
        e = opened.model.model.embed_tokens(ids)
        expected = block.mlp(block.post_attention_layernorm(e))
    torch.testing.assert_close(after_first_mlp(opened, ids), expected)
    torch.testing.assert_close(embedded(opened, ids), e)
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


@pytest.mark.parametrize("first_mlp", [True, False])
def test_phi_is_that_of_the_full_matrix(first_mlp: bool) -> None:
    opened, k = llama(), 300
    found = scan.relation_scores(opened, PAIRS, k=k, first_mlp=first_mlp, min_pairs=5)
    ids = [(word_token(opened.tokenizer, s), word_token(opened.tokenizer, t)) for s, t in found.kept_pairs]
    source, target = torch.tensor(ids).T
    for site in opened.sites:
        read = after_first_mlp(opened, source) if first_mlp and site.layer else embedded(opened, source)
        for head in range(site.heads):
            full = read.double() @ site.W_V[head // 2].double() @ site.W_O[head].double()
            logits = full @ opened.model.lm_head.weight.double().T
            above = (logits > logits.gather(1, target[:, None])).sum(-1)
            place = {"layer": site.layer, "head": head}
            assert found.scores.sel(place).item() == pytest.approx((above < k).double().mean().item())
            below = logits.shape[1] - 1 - above
            assert found.suppression.sel(place).item() == pytest.approx((below < k).double().mean().item())
    rows = token_map(opened, 1, 3, source[:2], first_mlp)
    assert rows.shape == (2, logits.shape[1])
    if first_mlp:
        torch.testing.assert_close(rows.double(), logits[:2], rtol=1e-4, atol=1e-4)


class Copier(nn.Module):
    """A language model of one head with `W_V W_O = sign I` and tied one-hot embeddings."""

    def __init__(self, sign: float):
        super().__init__()
        base = InductionCircuit(len(tokenizer()), 4)
        self.attention = base.layers[0].__class__(len(tokenizer()), len(tokenizer()))
        self.embed = nn.Embedding(len(tokenizer()), len(tokenizer()))
        self.unembed = nn.Linear(len(tokenizer()), len(tokenizer()), bias=False)
        self.layers = nn.ModuleList([nn.Sequential(self.attention, nn.Linear(1, 1))])
        with torch.no_grad():
            for weight in (self.embed.weight, self.unembed.weight, self.attention.v_proj.weight):
                weight.copy_(torch.eye(len(tokenizer())))
            self.attention.o_proj.weight.copy_(sign * torch.eye(len(tokenizer())))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def can_generate(self) -> bool:
        return True

    def forward(
        self, input_ids: torch.Tensor, attention_mask: object = None, use_cache: bool = False
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=self.unembed(self.attention(self.embed(input_ids))))


@pytest.mark.parametrize(("sign", "expected"), [(1.0, (1, 0)), (-1.0, (0, 1))])
def test_an_identity_head_copies_and_its_opposite_suppresses(sign: float, expected: tuple[int, int]) -> None:
    opened = open_model(Copier(sign), tokenizer=tokenizer())
    same = [(word, word) for word in WORDS]
    found = scan.relation_scores(opened, same, k=1, first_mlp=False, min_pairs=5)
    assert (found.scores.item(), found.suppression.item()) == expected
    (best, *_) = salient_mappings(opened, 0, 0, n_tokens=2, n_targets=1, first_mlp=False)
    assert best.gain == pytest.approx(1)
    assert (best.targets == [best.token]) == (sign > 0)


def test_heads_of_a_group_share_their_values() -> None:
    opened = llama()
    with torch.no_grad():
        opened.sites[1].W_O[1] = opened.sites[1].W_O[0]
    source = torch.arange(3, 40)
    hits = static_hits(opened, source, source + 1, torch.full_like(source, 50))[1][0]
    assert torch.equal(hits[0], hits[1]), "the same value head and the same output matrix"


def test_shuffled_pairs_score_at_chance() -> None:
    opened = llama()
    size = len(tokenizer()) - 3
    source, target = torch.arange(size) + 3, torch.randperm(size, generator=torch.Generator().manual_seed(1)) + 3
    hits = static_hits(opened, source, target, torch.full_like(source, 40))
    share = torch.stack([hit.float().mean() for hit, _ in hits.values()]).mean().item()
    assert share == pytest.approx(40 / len(tokenizer()), rel=0.5)


def test_the_forced_output_is_the_value_of_the_source() -> None:
    """What the study takes for attention forced onto one token is what a score bias on it gives, layer by layer."""
    opened = llama()
    ids = torch.tensor([[0, 10, 11, 12, 13]])
    names = Segments.from_spans({"word": (2, 3), "last": (4, 5)}, 5)
    for layer in (0, 1):
        force = ScoreBias(layer=layer, value=1e4, keys="word", queries="last")
        with attend(opened, [HeadOutput("vector", layers=layer, queries=[-1])], [force], {"text": names}) as forced:
            opened.model(input_ids=ids)
        with attend(opened, [Inputs(("v",), layers=layer)]) as plain:
            opened.model(input_ids=ids)
        output = forced.tree["text"]["head_output"].squeeze().transpose("head", "channel").values
        value = plain.tree["text"]["input_v"].squeeze()
        token = next(d for d in value.dims if d not in ("head", "channel"))
        np.testing.assert_allclose(output, value.isel({token: 2}).transpose("head", "channel").values, atol=1e-5)


def test_the_question_has_a_column_for_every_relation_it_could_read() -> None:
    found = scan.heads(llama(), questions=[scan.MapsRelations(relations=("pronoun", "next_year"), min_pairs=4)])
    names = [column["name"] for column in found.about["columns"]]
    assert names == ["maps_relations", "maps_pronoun"]
    assert found.data["maps_pairs"].sel(stream="text", relation="pronoun") >= 4
    assert (found.heads["maps_relations"] == found.heads["maps_pronoun"]).all()
    assert found.data["maps_suppression"].dims == ("stream", "relation", "layer", "head")


def test_the_shipped_relations_are_lists_of_different_pairs() -> None:
    for relation in relations().values():
        assert 40 <= len(relation.pairs) <= 100, relation.name
        assert len(set(relation.pairs)) == len(relation.pairs), relation.name
        assert all(word and word == word.strip() for pair in relation.pairs for word in pair)
    assert dict(relations()["first_letter"].pairs)["water"] == "w"
    assert dict(relations()["next_year"].pairs)["1999"] == "2000"


def test_only_pairs_of_one_token_a_word_are_kept() -> None:
    assert single_tokens(tokenizer(), [("house", "man"), ("house", "xyzzy")]) == [
        (tokenizer().vocab["house"], tokenizer().vocab["man"])
    ]


def test_rules_name_what_a_head_does() -> None:
    made = [
        Mapping(" cat", 1.0, [" cat", " Cat"]),
        Mapping(" walking", 1.0, [" walked"]),
        Mapping(" th", 1.0, [" there"]),
    ]
    rates = describe_rules([*made, Mapping(" dog", 1.0, [" d", " \u0441\u043e\u0431\u0430\u043a\u0430", "..."])])
    expected = {"identity": 1, "case": 1, "stem": 1, "completion": 1, "first_letter": 1, "other_script": 1}
    assert rates == {name: count / 4 for name, count in expected.items()}
    assert "' walking' -> ' walked'" in salient_prompt(made)
    with pytest.raises(HeadwiseError, match="at least one"):
        describe_rules([])


def test_gains_are_those_of_the_written_vectors() -> None:
    opened = llama()
    found = salient_mappings(opened, 1, 2, n_tokens=5, n_targets=3)
    ids = torch.arange(len(tokenizer()))
    read = after_first_mlp(opened, ids)
    site = opened.sites[1]
    gains = (read @ site.W_V[1] @ site.W_O[2]).norm(dim=-1) / read.norm(dim=-1)
    order = gains.argsort(descending=True)[:5]
    assert [m.token for m in found] == tokenizer().batch_decode(order[:, None])
    np.testing.assert_allclose([m.gain for m in found], gains[order].detach(), rtol=1e-4)


def test_salient_operations_score_every_head() -> None:
    found = scan.heads(llama(), questions=[scan.SalientOperations(n_tokens=4, n_targets=2)])
    rules = [c for c in found.heads if c.startswith("salient_") and c != "salient_operations"]
    np.testing.assert_allclose(found.heads["salient_operations"], found.heads[rules].max(axis=1))


def test_norms_in_front_of_attention_are_found_with_their_gain() -> None:
    opened = llama()
    norm = opened.model.model.layers[1].input_layernorm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 32))
    found = norms_before(opened, {"input_ids": torch.tensor([[1, 2, 3]])}, "text")
    assert found == {n: layer.input_layernorm for n, layer in enumerate(opened.model.model.layers)}
    torch.testing.assert_close(gain(norm, 32), norm.weight.detach())
    assert not removes_mean(norm, 32)
    post = bert()
    found = norms_before(post, {"input_ids": torch.tensor([[1, 2, 3]])}, "text")
    assert found == {0: post.model.embeddings.LayerNorm, 1: post.model.encoder.layer[0].output.LayerNorm}
    assert removes_mean(found[0], 32)


def test_folding_the_norms_is_multiplying_by_their_gains() -> None:
    opened = llama()
    plain = scan.relation_scores(opened, PAIRS, k=300, min_pairs=5)
    folded = scan.relation_scores(opened, PAIRS, k=300, min_pairs=5, fold_norm=True)
    np.testing.assert_allclose(plain.scores, folded.scores)  # all gains are 1
    with torch.no_grad():
        opened.model.model.norm.weight.mul_(-1)
    turned = scan.relation_scores(opened, PAIRS, k=300, min_pairs=5, fold_norm=True)
    np.testing.assert_allclose(turned.scores, plain.suppression)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: scan.relation_scores(llama(), "rhyme"), "none called 'rhyme'"),
        (lambda: scan.relation_scores(llama(), PAIRS, min_pairs=400), "wanted 400 pairs"),
        (lambda: scan.relation_scores(llama(), PAIRS, k=0), "at least 1; got 0"),
        (lambda: scan.relation_scores(bert(), PAIRS), "lacks a decoder-only"),
        (lambda: token_map(llama(), 5, 0, [1]), "layers 0 to 1; got 5"),
        (lambda: token_map(llama(), 0, 9, [1]), "heads 0 to 3; got 9"),
        (lambda: salient_mappings(bert(), 0, 0), "lacks a decoder-only"),
        (lambda: scan.MapsRelations(min_pairs=50, max_pairs=40), "min_pairs <= max_pairs"),
        (lambda: scan.SalientOperations(n_tokens=0), "at least 1; got 0"),
        (
            lambda: scan.heads(llama(), questions=[scan.MapsRelations(relations=("next_year",))]),
            "fewer than min_pairs=30",
        ),
    ],
)
def test_bad_input_is_named(call: object, words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        call()  # type: ignore[operator]


def test_a_model_without_a_feed_forward_part_is_told_apart() -> None:
    assert "feed-forward" in scan.MapsRelations().lacks(circuit())
