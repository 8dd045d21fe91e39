"""Convolved and mixed attention: the paper's formula in loops, documents that stay apart, and blocks of rows."""

from __future__ import annotations

import pytest
import torch

from headwise import swap
from headwise.attention import LogSumExp, Map, attend
from headwise.attention.mask import Mask
from headwise.errors import HeadwiseError
from headwise.swap import multi_token
from tests.models.tiny import llama
from tests.swap.cases import DIM, HEADS, tokens
from tests.swap.test_convert import IDS, out

PLAIN = {"norm": False, "gate": None}


def make(seed: int = 0, std: float = 0.3, **own) -> swap.MultiTokenAttention:
    """Away from the identity it starts as."""
    torch.manual_seed(seed)
    layer = swap.MultiTokenAttention(DIM, HEADS, **{"causal": True, "c_q": 3, "c_k": 5, **own}).double().eval()
    shake(layer, std)
    return layer


def shake(layer: torch.nn.Module, std: float = 0.3) -> None:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "kernel" in name or "mixing" in name or "gate" in name or "norm" in name:
                parameter.add_(std * torch.randn_like(parameter))


def reference(layer: swap.MultiTokenAttention, x: torch.Tensor) -> torch.Tensor:
    """The card's sums, one pair of tokens at a time, for a causal layer without positions and groups."""
    q, k, v = (
        split(m(x), heads)
        for m, heads in ((layer.q_proj, 4), (layer.k_proj, layer.kv_heads), (layer.v_proj, layer.kv_heads))
    )
    k, v = (part.repeat_interleave(4 // layer.kv_heads, 1) for part in (k, v))
    n = x.shape[1]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    s = (q @ k.mT / layer.head_dim**0.5).masked_fill(future, 0.0)
    s = mix(slide(s, layer.pre_kernel), layer.pre_mixing)
    a = s.masked_fill(future, float("-inf")).softmax(-1)
    a = mix(slide(a, layer.post_kernel).masked_fill(future, 0.0), layer.post_mixing)
    z = a @ v
    if layer.norm is not None:
        z = z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight * layer.norm_scale
    if layer.gate is not None:
        z = z * torch.sigmoid(z @ layer.gate.weight.T + layer.gate.bias)
    return z.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def slide(s: torch.Tensor, kernel: torch.Tensor | None) -> torch.Tensor:
    if kernel is None:
        return s
    made, (_, c_q, c_k), n = torch.zeros_like(s), kernel.shape, s.shape[-1]
    for i in range(n):
        for j in range(n):
            for a in range(min(c_q, i + 1)):
                for b in range(-(c_k // 2), c_k // 2 + 1):
                    if 0 <= j + b < n:
                        made[:, :, i, j] += kernel[:, c_q - 1 - a, b + c_k // 2] * s[:, :, i - a, j + b]
    return made


def mix(s: torch.Tensor, mixing: torch.Tensor | None) -> torch.Tensor:
    if mixing is None:
        return s
    made, size = torch.zeros_like(s), mixing.shape[-1]
    for h in range(s.shape[1]):
        for g in range(h // size * size, h // size * size + size):
            made[:, h] += mixing[h // size, h % size, g % size] * s[:, g]
    return made


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"kv_heads": 2, "c_h": 2, "depth": 3, "gate": "channel"},
        {"post_kq": False, "post_head": False, **PLAIN},
        {"pre_kq": False, "pre_head": False},
        {"c_q": 1, "c_k": 1},
    ],
)
def test_equals_the_papers_sums(own: dict):
    layer, x = make(**own), tokens(2, 8)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "own", [{"position": swap.Rope(), "kv_heads": 2}, {"position": swap.Alibi()}, {"qk_norm": True}]
)
def test_starts_as_plain_attention(own: dict):
    layer, plain = make(std=0, **PLAIN, **own), swap.Attention(DIM, HEADS, causal=True, **own).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(tokens()), plain(tokens()), rtol=0, atol=1e-12)


def test_a_kernel_shifts_as_its_place_says():
    layer = make(std=0, c_q=2, c_k=3, post_kq=False, pre_head=False, post_head=False, **PLAIN)
    with torch.no_grad():
        layer.pre_kernel.zero_()
        layer.pre_kernel[:, 0, 0] = 1.0  # one row back, one key to the left
    form = multi_token.MultiTokenForm(layer, layer.visible(None, 1), {})
    s = torch.zeros(1, HEADS, 5, 5, dtype=torch.float64)
    s[..., 2, 1] = 1.0
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    moved = form.convolved("scores", s, layer.pre_kernel, seen)
    assert moved.nonzero()[:, 2:].tolist() == [[3, 2]] * HEADS


def test_groups_of_two_heads_by_hand():
    layer = make(std=0, c_h=2)
    mixing = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [-1.0, 0.0]]], dtype=torch.float64)
    s = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)[None, :, None, None]
    assert multi_token.mixed(s, mixing).flatten().tolist() == [21.0, 43.0, 1000.0, -100.0]
    assert layer.pre_mixing.shape == (2, 2, 2)


def test_packed_documents_stay_apart():
    layer, x = make(), tokens(1, 10)
    document = torch.tensor([0] * 4 + [1] * 6)
    mask = (document[:, None] == document)[None, None]
    alone = torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1)
    torch.testing.assert_close(layer(x, mask=mask), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["dense", "kernel"])
@pytest.mark.parametrize("kind", ["keys", "pairs", "added", "rule"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_the_left_changes_no_token(causal: bool, kind: str, path: str, monkeypatch: pytest.MonkeyPatch):
    layer, x, lead = make(causal=causal, position=swap.Rope()), tokens(2, 14), 5
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[0, :lead] = False
    right = 0 if causal else None
    mask = {
        "keys": valid,
        "pairs": valid[:, None, None],
        "added": Mask(right=right, added=(~valid[:, None, None]).double() * torch.finfo(torch.float64).min, batch=2),
        "rule": Mask(right=right, rule=lambda b, h, i, j: valid[b, j], batch=2),
    }[kind]
    if path == "kernel":
        monkeypatch.setattr(multi_token, "DENSE_PLACES", 0)
        monkeypatch.setattr(multi_token, "PLACES", 14)  # blocks of as many rows as one reaches back
    with torch.no_grad():
        with attend(layer) as run:
            y = layer(x, mask=mask)
        assert [taken for taken, _ in run.paths.values()] == [path]
        torch.testing.assert_close(y[:1, lead:], layer(x[:1, lead:]), rtol=0, atol=1e-12)
        torch.testing.assert_close(y[1:], layer(x[1:]), rtol=0, atol=1e-12)


def test_padding_that_sees_a_prefix_changes_no_token():
    """Hosts that look both ways within a prefix hand over one mask for padding and tokens."""
    layer, x, lead = make(position=swap.Rope()), tokens(1, 14), 5
    seen = torch.ones(14, 14, dtype=torch.bool).tril() | (torch.arange(14) < 9)
    padded = (seen & (torch.arange(14) >= lead))[None, None]
    with torch.no_grad():
        alone = layer(x[:, lead:], mask=Mask(allowed=seen[None, None, lead:, lead:]))
        whole = layer(x, mask=Mask(allowed=padded))
        cache = swap.Cache()
        parts = [
            layer(x[:, n:end], mask=Mask(allowed=padded[:, :, n:end, :end]), cache=cache)
            for n, end in ((0, 10), (10, 11), (11, 14))
        ]
    torch.testing.assert_close(whole[:, lead:], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_blocks_of_rows_equal_the_whole(monkeypatch: pytest.MonkeyPatch):
    layer, x = make(position=swap.Rope()), tokens(1, 160)
    wanted = layer(x).detach()  # with gradients: the whole matrix
    monkeypatch.setattr(multi_token, "PLACES", 160 * 7)
    with torch.no_grad():
        with attend(layer) as run:
            torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-12)
        assert [path for path, _ in run.paths.values()] == ["kernel"]
        cache = swap.Cache()
        monkeypatch.setattr(multi_token, "DENSE_PLACES", 0)
        parts = [layer(part, cache=cache) for part in x.split([3, 140, 1, 16], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=1e-12)


def test_what_can_be_read():
    x, before, after = tokens(1, 6), make(post_kq=False, post_head=False), make()
    with attend(before, [LogSumExp()]) as run:
        before(x)
    (node,) = run.tree.children.values()
    assert node.dataset["lse"].notnull().all()
    with attend(after, [Map()]) as run:
        after(x)
    (node,) = run.tree.children.values()
    assert node.dataset["map"].values.min() < 0  # weights mixed over heads can be negative
    with pytest.raises(HeadwiseError, match="no log-sum-exp"), attend(after, [LogSumExp()]):
        after(x)


def test_in_a_trained_model():
    model = llama(64)
    plain = out(model)
    with swap.convert(model, "multi_token_attention") as conversion:
        torch.testing.assert_close(out(model), plain, rtol=0, atol=1e-6)
        shake(model)
        alone = model(IDS[:1, 2:]).logits
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        padded = model(IDS, attention_mask=mask).logits
        torch.testing.assert_close(padded[0, 2:], alone[0], rtol=0, atol=1e-5)
        for given in ({}, {"attention_mask": mask}, {"num_beams": 3}):
            given = dict(max_new_tokens=6, do_sample=False, **given)
            assert torch.equal(model.generate(IDS, **given), model.generate(IDS, use_cache=False, **given))
        assert all(m.norm is None and m.gate is None for m in conversion.mechanisms.values())


def test_bad_input():
    with pytest.raises(HeadwiseError, match=r"c_q, c_k: wanted a positive and an odd number; got c_q=3, c_k=4"):
        make(c_k=4)
    with pytest.raises(HeadwiseError, match=r'c_h: wanted "all" or a divisor of 4 heads; got 3'):
        make(c_h=3)
    with pytest.raises(HeadwiseError, match=r"gate: wanted head, channel or None; got 'token'"):
        make(gate="token")
