"""The studies of mechanisms of heads, on few steps and small models: that they run, and that their measures measure."""

from __future__ import annotations

import math

import pytest
import torch

from headwise import swap
from headwise.study import swap_fixed_head, swap_head_mask, swap_mixture_of_head, swap_multi_query
from headwise.study.bench_tasks import TASKS
from headwise.study.finding import Finding
from headwise.study.swap_find_block import BLOCKS, SIZE, blocks, error, find_the_block
from headwise.study.swap_head_embedding import LAYERS, head_embeddings
from headwise.study.swap_multi_token import multi_token_language
from headwise.study.swap_train import count, host, pair_bits
from tests.scan.models import llama


def shown(finding: Finding) -> dict:
    assert finding.verdict in ("holds", "fails", "untestable")
    assert finding.seeds == [0]
    return finding.measured


def test_multi_query_runs():
    found = shown(swap_multi_query.multi_query(seeds=(0,), steps=2, tuning=2, rows=2))
    assert found["cached_numbers_per_token_and_layer"] == {"8": 128, "2": 32, "1": 16, "single head": 16}
    sizes = found["parameters"].values()
    assert max(sizes) - min(sizes) < 300
    assert len(found["bits_per_character"]) == 11


def test_merging_the_heads_of_a_model():
    opened = llama()
    found = shown(swap_multi_query.kv_heads_merged(opened, seeds=(0,), tokens=60))
    assert set(found["loss"]) == {"as it was", "mean", "first", "random"}
    assert len({round(value, 6) for value in found["loss"].values()}) == 4
    assert not any(isinstance(m, swap.Mechanism) for m in opened.model.modules())


def test_fixed_head_size_runs():
    found = shown(swap_fixed_head.fixed_head_size(seeds=(0,), heads=(1, 2), head_dim=40, length=6, steps=2))
    assert found["mean"]["fixed"].keys() == {"1", "2"}
    for number, size in found["parameters"]["fixed"].items():
        assert abs(found["parameters"]["standard, as large"][number] - size) < 100


def test_the_copy_task_asks_for_the_named_token():
    batch = swap_fixed_head.copies(5, 3, rows=4)(torch.Generator().manual_seed(0))
    symbol, named = (part.argmax(-1) for part in batch["x"].split([3, 5], -1))
    assert torch.equal(batch["labels"], symbol.gather(1, named))


def test_head_embeddings_run():
    found = shown(head_embeddings(seeds=(0,), steps=2, rows=2))
    assert found["bits_per_character"].keys() == LAYERS.keys()
    assert found["attention_parameters"]["MHE-MUL"] == 3 * 64 * 8 + 3 * 8 * 8 + 64 * 64


def test_mixtures_of_heads_run():
    found = shown(swap_mixture_of_head.mixture_of_heads(seeds=(0,), steps=2, rows=2))
    assert 0 < found["mean"]["use, mixture"] <= 1
    found = shown(swap_mixture_of_head.mixture_of_heads_conversion(llama(), seeds=(0,), steps=2, tuning=1, rows=2))
    assert len(set(found["real_model_loss"].values())) == 4


@pytest.mark.parametrize("kind", swap_mixture_of_head.ROUTERS.values())
def test_controls_use_as_many_heads(kind: type[swap.MixtureOfHeadAttention]):
    layer = kind(32, 8, shared=4, topk=2, router="qnorm")
    layer(torch.randn(2, 5, 32))
    assert (layer.gates.sum(-1) == 6).all()
    assert (layer.gates[..., :4] == 1).all()


def test_use_is_even_or_not():
    task = TASKS["lm"]()
    task.rows = 1
    for topk, even in ((4, 1.0), (1, 0.0)):
        model = host(
            lambda _, topk=topk: swap.MixtureOfHeadAttention(64, 8, causal=True, shared=4, topk=topk), task, layers=1
        )
        torch.nn.init.zeros_(model.blocks[0].mechanism.pick.weight)  # a tie: the same head always
        assert swap_mixture_of_head.use(model, task) == pytest.approx(even, abs=1e-6)


def test_head_mask_runs():
    found = shown(swap_head_mask.head_mask(seeds=(0,), length=3, steps=2, cut=2))
    assert found["heads"] == 16
    assert found["seeds"].keys() == {f"{w}, {m}" for w in ("loss", "gini", "rise") for m in ("none", "rand", "impt")}


def test_gini():
    assert swap_head_mask.gini(torch.ones(2, 3)) == pytest.approx(0)
    assert swap_head_mask.gini(torch.tensor([0.0, 0, 0, 1])) == pytest.approx(0.75)


def test_reversed_strings_ask_for_the_other_alphabet():
    ids = swap_head_mask.reversed_strings(4, rows=50)(torch.Generator().manual_seed(0))["input_ids"]
    pairs = {(int(a), int(b)) for row in ids for a, b in zip(row[:4], row[5:].flip(0), strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 12


def test_find_the_block_runs():
    found = shown(find_the_block(seeds=(0,), steps=2, rows=2))
    assert found["error"].keys() == {"plain", "heads mixed", "multi-token"}


def test_multi_token_language_runs():
    found = shown(multi_token_language(seeds=(0,), steps=2, dim=16))
    assert found["bits_per_character"].keys() == {"plain", "heads mixed", "norm and gate", "multi-token"}
    assert found["perplexity_change"].keys() == {"plain", "heads mixed", "norm and gate"}


def test_one_block_alone_holds_both_letters():
    draw = blocks(64)
    ids = draw(torch.Generator().manual_seed(3))["input_ids"]
    for row in ids.tolist():
        found = [set(row[n * (SIZE + 1) : n * (SIZE + 1) + SIZE]) for n in range(BLOCKS)]
        given, answer = set(row[-SIZE - 2 : -SIZE]), set(row[-SIZE:])
        assert [block for block in found if given <= block] == [answer]

    class Right(torch.nn.Module):
        def forward(self, input_ids):
            logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 12).float()
            return type("Out", (), {"logits": logits})

    assert error(Right(), draw, 2) == 0


def test_a_table_of_pairs():
    task = TASKS["lm"]()
    task.vocabulary, task.training, task.kept = 3, torch.tensor([0, 1, 0, 1, 0, 2]), torch.tensor([0, 1, 2])
    after_0, after_1 = 3 / 6, 1 / 5  # 0 is followed by 1, 1, 2 and 1 by 0, 0; one more of each
    assert pair_bits(task) == pytest.approx(-(math.log2(after_0) + math.log2(after_1)) / 2)


def test_sizes_can_be_matched():
    task = TASKS["lm"]()
    plain = host(lambda _: LAYERS["MHA"](), task)
    other = host(lambda _: LAYERS["MQA"](), task, parameters=count(plain))
    assert abs(count(plain) - count(other)) < 200
