"""Focus directions and soft injection: what they learn, on small random models."""

import pytest
import torch

import headwise as hw
from headwise import steer
from headwise.attention.dense import weighed
from headwise.attention.effects import resolve
from headwise.models import Opened, Segments, open_model
from headwise.steer.focus_directions import Cached
from tests.families.causal import EXPERTS, SMALL
from tests.families.family import Family, build
from tests.scan.models import llama

IDS = torch.randint(3, 200, (14,), generator=torch.Generator().manual_seed(0))
PARTS = Segments.from_spans({"relevant": (4, 8), "answer": (11, 14)}, 14)
EXAMPLE = steer.Focus(IDS, PARTS)


@pytest.fixture(scope="module")
def opened() -> Opened:
    return llama()


def relevant(opened: Opened, *methods: steer.Method, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The mass on the relevant tokens: [layer, head, answer token]."""
    edits = [edit for method in methods for edit in method.edits(opened)]
    reading = hw.Mass(("relevant",), queries=[11, 12, 13])
    with hw.attend(opened, readings=[reading], edits=edits, segments=PARTS) as run, torch.no_grad():
        opened.model(ids[None])
    return torch.tensor(run.tree["text"]["mass"].values[0, ..., 0])


def test_the_loss_is_of_the_mass_the_model_has(opened: Opened) -> None:
    with torch.no_grad():
        mine = Cached.of(opened, EXAMPLE).mass(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
    torch.testing.assert_close(mine, relevant(opened), atol=1e-5, rtol=0)


def test_directions_raise_the_mass_they_were_learnt_for(opened: Opened) -> None:
    fitted = steer.FocusDirections(alpha=1.0).calibrate(opened, [EXAMPLE], epochs=60, lr=0.05)
    assert fitted.directions.shape == (2, 4, 8)
    # Each layer is learnt on the plain model's queries and keys: the first layer's are the same when all is steered.
    assert relevant(opened, fitted)[0].mean() > relevant(opened)[0].mean() + 0.1
    again = steer.FocusDirections(alpha=1.0).calibrate(opened, [EXAMPLE], epochs=60, lr=0.05)
    assert torch.equal(fitted.directions, again.directions)


def test_a_direction_is_a_bias_of_every_key(opened: Opened) -> None:
    d = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2))
    reading = [hw.Map(layers=0, heads=2), hw.Inputs(("k",), layers=0, heads=2)]
    with hw.attend(opened, readings=reading) as run, torch.no_grad():
        opened.model(IDS[None])
    a, k = (torch.tensor(run.tree["text"][n].values[0, 0, 0]) for n in ("map", "input_k"))
    wanted = a * torch.exp(0.3 * (k @ d[0, 2]) / 8**0.5)
    with (
        steer.apply(opened, steer.FocusDirections(d, alpha=0.3), segments=PARTS),
        hw.attend(opened, readings=reading[:1]) as run,
        torch.no_grad(),
    ):
        opened.model(IDS[None])
    found = torch.tensor(run.tree["text"]["map"].values[0, 0, 0])
    torch.testing.assert_close(found, wanted / wanted.sum(-1, keepdim=True), atol=1e-5, rtol=0)


def test_one_vector_on_all_keys_changes_nothing(opened: Opened) -> None:
    with torch.no_grad():
        plain = opened.model(IDS[None]).logits
        with hw.attend(opened, edits=[hw.Shift(k=torch.ones(8))]):
            torch.testing.assert_close(opened.model(IDS[None]).logits, plain, atol=1e-4, rtol=0)


CAPPED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "soft cap and window": Family("gemma2", SMALL | CAPPED | dict(attn_logit_softcapping=0.7)),
    "window": Family("mistral", SMALL | dict(sliding_window=6)),
    "sinks and window": Family("gpt_oss", SMALL | CAPPED | EXPERTS),
}


@pytest.mark.parametrize("family", KINDS.values(), ids=KINDS)
def test_the_training_sees_the_scores_of_the_model(family: Family) -> None:
    model = build(family)
    ids = IDS % 60 + 3
    with torch.no_grad():
        weights = torch.cat(model(ids[None], output_attentions=True).attentions)
    small = open_model(model)
    cached, d = Cached.of(small, steer.Focus(ids, PARTS)), torch.zeros(2, 4, 8)
    found = cached.mass(d, d)
    torch.testing.assert_close(found, weights[:, :, 11:14, 4:8].sum(-1), atol=1e-5, rtol=1e-4)
    # What it is taught is what steering does, in the first layer, whose queries and keys nothing else moved.
    d = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(5)).requires_grad_()
    taught = cached.mass(0.5 * d, d)[0]
    steered = relevant(small, steer.FocusDirections(d.detach(), alpha=0.5), ids=ids)[0]
    torch.testing.assert_close(taught.detach(), steered, atol=1e-5, rtol=1e-4)
    assert (taught - found[0]).abs().max() > 1e-3
    taught.sum().backward()
    assert d.grad[0].abs().max() > 1e-3


def test_a_key_direction_counts_only_on_some_keys(opened: Opened) -> None:
    draw = torch.Generator().manual_seed(3)
    directions, key_directions = torch.randn(2, 2, 4, 8, generator=draw)
    key_directions.requires_grad_()
    everywhere = [(hw.Shift(q=directions[0]), [0, 1, 2, 3]), (hw.Shift(k=key_directions[0]), [0, 1, 2, 3])]
    weighed(resolve(Cached.of(opened, EXAMPLE).calls[0], everywhere)).a[..., 4:8].sum().backward()
    assert key_directions.grad.abs().max() < 1e-4  # added to all keys: the softmax cancels it
    key_directions.grad = None
    some = Cached.of(opened, EXAMPLE, keys="relevant")
    mass = some.mass(0.3 * directions, 0.3 * key_directions)
    mass.sum().backward()
    assert key_directions.grad.abs().max() > 1e-2
    method = steer.FocusDirections(directions, 0.3, keys="relevant", key_directions=key_directions.detach())
    torch.testing.assert_close(relevant(opened, method)[0], mass[0].detach(), atol=1e-5, rtol=0)


def test_both_directions_are_learnt_where_keys_are_named(opened: Opened) -> None:
    settings = {"epochs": 30, "lr": 0.05}
    queries_only = steer.FocusDirections(alpha=1.0).calibrate(opened, [EXAMPLE], **settings)
    both = steer.FocusDirections(alpha=1.0, keys="relevant").calibrate(opened, [EXAMPLE], **settings)
    assert queries_only.key_directions is None
    assert relevant(opened, both)[0].mean() > relevant(opened, queries_only)[0].mean() + 0.05
    with pytest.raises(hw.HeadwiseError, match="no directions yet"):
        steer.FocusDirections(torch.ones(2, 4, 8), keys="relevant").edits(opened)


def test_the_last_token_is_found_behind_and_before_padding() -> None:
    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert steer.mark_last({"input_ids": ids, "attention_mask": mask}).mask("last").tolist() == [
        [False, False, True, False],
        [False, False, False, True],
    ]
    with pytest.raises(hw.HeadwiseError, match="input_ids"):
        steer.mark_last({"pixels": ids})


PROMPT = "the family was so much pleased"


def test_a_prompts_own_outputs_injected_change_nothing(opened: Opened) -> None:
    batch = opened.encode(PROMPT)
    method = steer.SoftInjection(steer.task_embedding(opened, [PROMPT]), torch.ones(2, 4))
    with torch.no_grad():
        plain = opened.model(**batch).logits
        with steer.apply(opened, method, segments=steer.mark_last(batch)):
            torch.testing.assert_close(opened.model(**batch).logits, plain, atol=1e-5, rtol=0)


def test_alpha_one_puts_the_embedding_in_place_at_the_last_token_only(opened: Opened) -> None:
    embedding = torch.randn(2, 4, 8)
    batch = opened.encode(PROMPT)
    reading = hw.HeadOutput(what="vector")
    found = []
    for alpha in (0.0, 1.0):
        edits = steer.SoftInjection(embedding, torch.full((2, 4), alpha)).edits(opened)
        with (
            hw.attend(opened, readings=[reading], edits=edits, segments=steer.mark_last(batch)) as run,
            torch.no_grad(),
        ):
            opened.model(**batch)
        found.append(torch.tensor(run.tree["text"]["head_output"].values[0]))
    torch.testing.assert_close(found[1][:, :, -1], embedding, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1][:, :, :-1], found[0][:, :, :-1], atol=1e-6, rtol=0)


def test_alpha_zero_is_the_plain_model_bit_for_bit(opened: Opened) -> None:
    batch = opened.encode(PROMPT)
    with torch.no_grad():
        plain = opened.model(**batch).logits
        with steer.apply(
            opened, steer.SoftInjection(torch.randn(2, 4, 8), torch.zeros(2, 4)), segments=steer.mark_last(batch)
        ):
            assert torch.equal(opened.model(**batch).logits, plain)


def test_prompts_of_a_batch_are_injected_at_their_own_last_tokens(opened: Opened) -> None:
    method = steer.SoftInjection(torch.randn(2, 4, 8), torch.rand(2, 4))
    prompts = [PROMPT, "a man", "the girls were so"]
    with torch.no_grad():
        together = method.logits(opened, prompts)
        for prompt, row in zip(prompts, together, strict=True):
            torch.testing.assert_close(method.logits(opened, [prompt])[0], row, atol=1e-4, rtol=1e-4)
        losses = [float(method.loss(opened, [(prompt, " house")])) for prompt in prompts]
        assert float(method.loss(opened, [(p, " house") for p in prompts])) == pytest.approx(sum(losses) / 3, abs=1e-4)


def test_alpha_can_be_learnt_in_batches(opened: Opened) -> None:
    train = [(PROMPT, " with"), ("a man of large", " fortune"), ("the girls", " were")]
    fitted = steer.SoftInjection().calibrate(opened, [PROMPT, "the girls"], train, train, steps=30, lr=0.3, batch=3)
    half = steer.SoftInjection(fitted.embedding, torch.full((2, 4), 0.5))
    with torch.no_grad():
        assert float(fitted.loss(opened, train)) < float(half.loss(opened, train)) - 0.01


def test_injection_learns_alpha_alone(opened: Opened) -> None:
    before = [p.clone() for p in opened.model.parameters()]
    train = [(PROMPT, " with"), ("a man of large", " fortune")]
    start = steer.SoftInjection(torch.randn(2, 4, 8), torch.full((2, 4), 0.5))
    fitted = start.calibrate(opened, [PROMPT, "the girls"], train, train, steps=60, lr=0.3)
    half = steer.SoftInjection(fitted.embedding, torch.full((2, 4), 0.5))
    with torch.no_grad():
        loss = [float(m.loss(opened, train)) for m in (fitted, half)]
    assert loss[0] < loss[1] - 0.01
    assert all(
        torch.equal(a, b) and b.requires_grad and b.grad is None for a, b in zip(before, opened.model.parameters())
    )


def test_bad_input(opened: Opened) -> None:
    ready = steer.SoftInjection(torch.ones(2, 4, 8), torch.full((2, 4), 0.5))
    with pytest.raises(hw.HeadwiseError, match=r"steer\.mark_last\(batch\)"), steer.apply(opened, ready):
        pass
    with pytest.raises(hw.HeadwiseError, match="segment 'relevant'"):
        steer.Focus(IDS, Segments.positions(14))
    with pytest.raises(hw.HeadwiseError, match="no directions yet"):
        steer.FocusDirections().edits(opened)
    with pytest.raises(hw.HeadwiseError, match="log_mass"):
        steer.FocusDirections().calibrate(opened, [EXAMPLE], loss="none")
    with pytest.raises(hw.HeadwiseError, match="wants embedding="):
        steer.SoftInjection().edits(opened)
    with pytest.raises(hw.HeadwiseError, match=r"SoftInjection\(alpha"):
        steer.SoftInjection(torch.ones(2, 4, 8), torch.ones(2, 3)).edits(opened)
    with pytest.raises(hw.HeadwiseError, match="adds no token"):
        steer.soft_injection.first_token(opened, PROMPT, "")
