"""Positional hidden scaling against attention written out, on models with separate, normed and joint projections."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import headwise as hw
from headwise import steer
from headwise.attention.seam import attention_inputs
from headwise.models import Opened, open_model
from headwise.steer.calibration import answer_logprob
from headwise.steer.positional_hidden import PositionalHiddenScaling
from headwise.study import tasks
from headwise.study.evaluate import Asked
from tests.scan.models import circuit, llama

IDS = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
CHANNEL = 5


def qwen() -> Opened:
    """Queries and keys are normed after their projection: the change is not linear in them."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return open_model(transformers.Qwen3ForCausalLM(config).eval())


def gpt2() -> Opened:
    """One matrix for queries, keys and values."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    return open_model(transformers.GPT2LMHeadModel(config).eval())


def projected(module: nn.Module, x: Tensor, place: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """The module's own steps, one after the other: [batch, heads, token, dim]."""
    if hasattr(module, "c_attn"):
        q, k, v = module.c_attn(x).split(32, -1)
    else:
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    q, k, v = (y.unflatten(-1, (-1, 8)) for y in (q, k, v))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    if place is not None:
        q, k = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, *place)
    return q, k, v


def written_out(method: PositionalHiddenScaling) -> Callable:
    """The attention layer of the paper."""

    def forward(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
        x = args[0] if args else kwargs["hidden_states"]
        n = x.shape[1]
        scaled = x.clone()
        scaled[:, method.skip_first :, method.channel] *= method.factor
        place = kwargs.get("position_embeddings")
        (q, k, v), (q2, k2, v2) = (projected(module, y, place) for y in (x, scaled))
        v2 = v2 if method.change_value else v
        z = []
        for q_, k_, v_ in ((q, k, v), (q2, k2, v2)):
            group = q_.shape[1] // k_.shape[1]
            s = q_ @ k_.repeat_interleave(group, 1).transpose(2, 3) / 8**0.5
            s = s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
            z.append(s.softmax(-1) @ v_.repeat_interleave(group, 1))
        z[0][:, :, n - method.last_rows :] = z[1][:, :, n - method.last_rows :]
        out = z[0].transpose(1, 2).flatten(2)
        return (module.c_proj(out) if hasattr(module, "c_proj") else module.o_proj(out), *output[1:])

    return forward


@torch.no_grad()
def logits(opened: Opened, ids: Tensor = IDS, **kwargs: object) -> Tensor:
    return opened.model(ids, **kwargs).logits


@pytest.mark.parametrize("change", [{}, {"factor": -1.0, "last_rows": 3}, {"skip_first": 4}, {"change_value": True}])
@pytest.mark.parametrize("make", [llama, qwen, gpt2])
def test_the_last_rows_are_those_written_out(make: Callable[[], Opened], change: dict) -> None:
    opened = make()
    opened.model.double()
    method = PositionalHiddenScaling(CHANNEL, layers=(0, 1), **change)
    plain = logits(opened)
    with steer.apply(opened, method):
        found = logits(opened)
    hooks = [site.module.register_forward_hook(written_out(method), with_kwargs=True) for site in opened.sites]
    wanted = logits(opened)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, wanted, atol=1e-8, rtol=0)
    torch.testing.assert_close(found[:, : -method.last_rows], plain[:, : -method.last_rows], atol=1e-8, rtol=0)
    assert (found - plain)[:, -1].abs().max() > 1e-3
    assert torch.equal(logits(opened), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in opened.model.modules())


@pytest.mark.parametrize("neutral", [{"factor": 1.0}, {"last_rows": 0}])
def test_factor_one_and_no_rows_are_the_plain_model(neutral: dict) -> None:
    opened = llama()
    with steer.apply(opened, PositionalHiddenScaling(CHANNEL, layers=(0, 1), **neutral)):
        steered = logits(opened)
    assert torch.equal(steered, logits(opened))


def test_only_the_chosen_layers() -> None:
    opened = llama(num_hidden_layers=3)
    with steer.apply(opened, PositionalHiddenScaling(CHANNEL, layers=(1, 1))) as run:
        logits(opened)
    assert ["recomputed" in line for line in run.explain().splitlines()[1:]] == [False, True, False]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_generated_token_asks_with_a_scaled_query(make: Callable[[], Opened], cache: str | None) -> None:
    opened = make()
    kwargs = {} if cache is None else {"cache_implementation": cache}
    with steer.apply(opened, PositionalHiddenScaling(CHANNEL, -1.0, (0, 1))):
        found = opened.model.generate(
            IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs
        )
    ids = IDS
    for step in range(5):
        with steer.apply(opened, PositionalHiddenScaling(CHANNEL, -1.0, (0, 1), last_rows=1 + step)):
            ids = torch.cat([ids, logits(opened, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("change", [{}, {"skip_first": 3}, {"change_value": True}])
@pytest.mark.parametrize("make", [llama, qwen, gpt2])
def test_beams_of_a_padded_batch_score_what_whole_forwards_do(
    make: Callable[[], Opened], change: dict, cache: str | None
) -> None:
    opened, steps, pads = make(), 4, (2, 0)
    opened.model.double()
    ids = torch.stack([torch.cat([torch.zeros(2, dtype=torch.long), IDS[0, :7]]), IDS[0, 3:]])
    mask = torch.tensor([[0] * 2 + [1] * 7, [1] * 9])
    asked = {"attention_mask": mask, "max_new_tokens": steps, "num_beams": 3, "num_return_sequences": 2}
    asked |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "cache_implementation": cache}
    asked |= {"output_scores": True, "return_dict_in_generate": True}
    with steer.apply(opened, PositionalHiddenScaling(CHANNEL, -1.0, (0, 1), **change)):
        found = opened.model.generate(ids, **asked)
    for n, sequence in enumerate(found.sequences):
        text, total = sequence[pads[n // 2] :][None], 0.0
        for step in range(steps, 0, -1):
            rows = steps - step + 1
            with steer.apply(opened, PositionalHiddenScaling(CHANNEL, -1.0, (0, 1), last_rows=rows, **change)):
                total += float(logits(opened, text[:, :-step])[0, -1].log_softmax(-1)[text[0, -step]])
        assert float(found.sequences_scores[n]) == pytest.approx(total / steps, abs=1e-4)
    assert not torch.equal(opened.model.generate(ids, **asked).sequences, found.sequences)


@pytest.mark.parametrize("left", [True, False])
def test_the_last_row_is_the_last_token_of_each_sample(left: bool) -> None:
    opened = llama()
    method = PositionalHiddenScaling(CHANNEL, layers=(0, 1))
    lengths = (12, 9)
    with steer.apply(opened, method):
        alone = [logits(opened, IDS[:, :n])[0, -1] for n in lengths]
        ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
        for row, n in enumerate(lengths):
            where = slice(12 - n, 12) if left else slice(0, n)
            ids[row, where], mask[row, where] = IDS[0, :n], 1
        place = (mask.cumsum(1) - 1).clamp(min=0)
        both = logits(opened, ids, attention_mask=mask, position_ids=place)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(both[row, 11 if left else n - 1], alone[row], atol=1e-4, rtol=0)


def test_readings_see_the_scaled_row() -> None:
    opened = llama()
    method = PositionalHiddenScaling(CHANNEL, factor=-3.0, layers=(0, 0))
    with hw.attend(opened, [hw.Map(layers=0)]) as plain:
        logits(opened)
    with steer.apply(opened, method), hw.attend(opened, [hw.Map(layers=0)]) as run:
        logits(opened)
    a, b = (torch.tensor(r.tree["text"]["map"].values[0, 0]) for r in (plain, run))
    torch.testing.assert_close(b[:, :-1], a[:, :-1], atol=1e-6, rtol=0)
    assert (b[:, -1] - a[:, -1]).abs().max() > 1e-3
    torch.testing.assert_close(b.sum(-1), torch.ones(4, 12), atol=1e-5, rtol=0)


def test_calibration_finds_the_channel_that_hides_the_answer() -> None:
    opened = llama()
    examples = [steer.Choice("the family was so much pleased with", (" him", " her"), gold=n) for n in (0, 0)]
    method = PositionalHiddenScaling(0, layers=(0, 1))
    channels = range(6)
    found = method.calibrate(opened, examples, channels)
    scores = {}
    for c in channels:
        with steer.apply(opened, PositionalHiddenScaling(c, layers=(0, 1))):
            scores[c] = float(steer.option_logprobs(opened, examples[0])[0])
    assert found.channel == max(scores, key=lambda c: scores[c])
    with steer.apply(opened, found):
        best = float(steer.option_logprobs(opened, examples[0])[0])
    assert best >= max(*scores.values(), float(steer.option_logprobs(opened, examples[0])[0])) - 1e-5
    again = steer.PositionalHiddenScaling(3, layers=(0, 1)).calibrate(opened, examples, factors=())
    assert (again.channel, again.factor) == (3, 1.0)


def test_answers_of_several_tokens_are_scored_as_the_model_would_write_them() -> None:
    opened, method = llama(), PositionalHiddenScaling(CHANNEL, -3.0, (0, 1))
    opened.model.double()
    options = (" pleased with him", " in the house")
    choice = tasks.Example("the family was so much", options, gold=0)

    def written(method: PositionalHiddenScaling, option: str) -> float:
        """Token by token through a cache."""
        ids, text = (opened.encode(t)["input_ids"] for t in (choice.prompt, choice.prompt + option))
        total, cache = 0.0, None
        with steer.apply(opened, method), torch.no_grad():
            for at in range(ids.shape[1], text.shape[1]):
                start = 0 if cache is None else at - 1
                out = opened.model(text[:, start:at], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                total += float(out.logits[0, -1].log_softmax(-1)[text[0, at]])
        return total

    wanted = torch.tensor([written(method, option) for option in options])
    found = Asked(opened, choice).scores([method])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert (found - Asked(opened, choice).scores()).abs().max() > 1e-2
    example = steer.Example.of(choice)
    assert answer_logprob(opened, [example], method) == pytest.approx(float(wanted[0]), abs=1e-4)
    scores = {f: written(PositionalHiddenScaling(CHANNEL, f, (0, 1)), options[0]) for f in (1.0, 0.0, -3.0, 4.0)}
    best = max(scores, key=lambda f: scores[f])
    assert (
        PositionalHiddenScaling(CHANNEL, 0.0, (0, 1)).calibrate(opened, [choice], factors=tuple(scores)).factor == best
    )
    assert best != 1.0


def test_what_a_module_would_attend_with_is_what_it_does() -> None:
    opened = llama()
    kept: list[tuple] = []

    def ask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        kept.append(attention_inputs(module, args, kwargs))

    handle = opened.sites[0].module.register_forward_pre_hook(ask, with_kwargs=True)
    with hw.attend(opened, [hw.Inputs(("q", "k", "v"), layers=0)]) as run:
        cache = logits(opened, use_cache=True)
    handle.remove()
    node = run.tree["text"]
    for x, name in zip(kept[0], ("q", "k", "v"), strict=True):
        own = x.repeat_interleave(4 // x.shape[1], 1)
        torch.testing.assert_close(torch.tensor(node[f"input_{name}"].values[0, 0]), own[0], atol=1e-6, rtol=0)
    assert torch.equal(cache, logits(opened))
    handle = opened.sites[0].module.register_forward_pre_hook(ask, with_kwargs=True)
    with pytest.raises(hw.HeadwiseError, match="inside attend"):
        logits(opened)
    handle.remove()


@pytest.mark.parametrize(
    "wrong,said",
    [
        (lambda: PositionalHiddenScaling(-1), "channel="),
        (lambda: PositionalHiddenScaling(1, factor=float("nan")), r"factor"),
        (lambda: PositionalHiddenScaling(1, layers=(3, 2)), r"layers"),
        (lambda: PositionalHiddenScaling(1, layers=(0, 2)).edits(llama()), "layers 0 to 1; got 0 to 2"),
        (lambda: PositionalHiddenScaling(1, layers=(0, 1)).calibrate(llama(), []), "one or more Choices"),
    ],
)
def test_bad_settings_say_what_was_wanted(wrong: Callable, said: str) -> None:
    with pytest.raises(hw.HeadwiseError, match=said):
        wrong()


def test_what_a_model_may_lack() -> None:
    assert PositionalHiddenScaling(40).lacks(llama()) == "a channel 40: hidden states have 32"
    heads = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2)
    assert PositionalHiddenScaling(1).lacks(open_model(heads)) is not None
    assert PositionalHiddenScaling(1).lacks(circuit()) is None
    edits = PositionalHiddenScaling(1, layers=(0, 1)).edits(llama())
    with pytest.raises(hw.HeadwiseError, match=r"steer\.apply"), hw.attend(opened := llama(), edits=edits):
        logits(opened)
