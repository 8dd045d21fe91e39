"""The variants of the study of mixing are what they say, and it measures them."""

import torch

from headwise import scan
from headwise.models import open_model
from headwise.study.mixing import VARIANTS, conclude, decoder, indicators, mixing_principles
from headwise.study.train import Recipe, build, train, windows


def moved(model, place: int) -> list[int]:
    """The positions whose logits change when the token at one place does."""
    ids = torch.arange(12)[None]
    other = ids.clone()
    other[0, place] = 19
    with torch.no_grad():
        gap = (model(input_ids=ids).logits - model(input_ids=other).logits).abs().amax(-1)[0]
    return (gap > 1e-6).nonzero().flatten().tolist()


def test_no_mixing_keeps_every_token_to_itself() -> None:
    none, standard, hybrid = (
        build(lambda kind=kind: decoder(20, VARIANTS[kind]).eval()) for kind in ("none", "standard", "none_hybrid")
    )
    assert moved(none, 4) == [4]
    assert moved(standard, 4) == moved(hybrid, 4) == list(range(4, 12))


def test_fixed_maps_stay_fixed_in_training_and_still_learn() -> None:
    model = build(lambda: decoder(20, VARIANTS["fixed_hybrid"]))
    before = model.model.layers[0].self_attn.q_proj.bias.detach().clone()
    train(model, windows(torch.arange(400) * 7 % 20, rows=4, length=30), Recipe(steps=3, lr=1e-2))
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.bias, before)
    maps = []
    for seed in (0, 1):
        ids = torch.randint(20, (1, 16), generator=torch.Generator().manual_seed(seed))
        found = scan.heads(open_model(model), inputs={"input_ids": ids}, questions=["distance", "entropy"])
        maps.append(found.data["entropy"].sel(stream="text"))
    gap = abs(maps[0] - maps[1]).max("head")
    assert gap[[0, 2]].max() < 1e-6 < gap[[1, 3]].min()
    assert maps[0].sel(layer=0).std() > 1e-3, "every head has a map of its own"


def test_the_indicators_of_no_mixing_are_those_of_the_identity() -> None:
    found = indicators(
        build(lambda: decoder(20, VARIANTS["none"]).eval()), {"input_ids": torch.arange(16)[None]}, [1, 3]
    )
    wanted = {"entropy": 0, "concentration": 4, "sink": 1 / 16, "diversity": 0, "focus_0": 1, "focus_1": 0}
    assert {name: round(found[name], 5) for name in wanted} == wanted


def test_the_study_trains_every_variant() -> None:
    found = mixing_principles(seeds=[0], steps=2)
    assert set(found.measured["loss"]) == set(VARIANTS)
    assert len(found.measured["runs"]) == 5
    assert found.verdict == "fails", "two steps teach nothing"


def test_the_verdict_wants_the_order_and_the_hybrids() -> None:
    losses = {"standard": 1.0, "fixed": 1.1, "none": 2.0, "fixed_hybrid": 1.02, "none_hybrid": 1.1}

    def verdict(**changed: float) -> str:
        rows = [{"variant": name, "seed": 0, "loss": loss} for name, loss in (losses | changed).items()]
        return conclude(rows, steps=1).verdict

    assert verdict() == "holds"
    assert verdict(fixed=0.9) == verdict(none=1.15) == verdict(none_hybrid=1.9) == "fails"
