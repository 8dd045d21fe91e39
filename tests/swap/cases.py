"""What every mechanism is tested with: its settings at a small size. One that is not here fails the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from headwise import swap

DIM, HEADS, LENGTH = 32, 4, 12


@dataclass(frozen=True)
class Case:
    """`own`: settings beside the sizes. `formula`: how many parameters it must have, from the paper's formula, for
    width d, h heads, k key-value heads, head width p."""

    formula: Callable[[int, int, int, int], int] | None = None
    own: dict[str, Any] = field(default_factory=dict)
    kv_heads: int | None = None
    tolerance: float = 1e-9
    """Of decoding through a cache against the full pass, in float64."""
    readable: bool = True
    """Whether its attention goes through the core, so that readings see it."""


def projections(d: int, h: int, k: int, p: int) -> int:
    return 2 * d * h * p + 2 * d * k * p


def embedded(d: int, h: int, k: int, p: int) -> int:
    """One projection for all heads, three vectors for each."""
    return 3 * d * p + 3 * h * p + d * h * p


def shared_mlp(p: int, small: int) -> int:
    """Two maps to `small` numbers, and layers 2 small -> small -> small / 2 -> 1."""
    hidden = small // 2
    return 2 * (p + 1) * small + (2 * small + 1) * small + (small + 1) * hidden + hidden + 1


MULTI_TOKEN_PRE = {"post_kq": False, "pre_head": False, "post_head": False, "norm": False, "gate": None}

GATED_SOFTMAX = {"normaliser": "layer", "in_gate": True, "out_gate": True, "clamp": 3.0}
OUTSIDE_SIGMOID = {"b": 0.0, "divide": "sqrt", "qk_norm": False, "layer_scale": 0.5, "out_norm": True}

CASES: dict[str, list[Case]] = {
    "attention": [
        Case(projections, {"position": swap.Rope()}, kv_heads=2),
        Case(projections, {"position": swap.Alibi()}),
        Case(projections, {"normaliser": swap.Activation("relu")}),
        Case(projections, {"normaliser": swap.Entmax(1.5)}),
        Case(lambda d, h, k, p: projections(d, h, k, p) + 2 * 8 * 8 + 8 + 8, {"score": swap.Additive(8)}),
        Case(lambda d, h, k, p: projections(d, h, k, p) + 1 + 2 * p, {"score": swap.Cosine(), "qk_norm": True}),
    ],
    "fixed_head_attention": [Case(projections, {"head_dim": 16, "position": swap.Rope()}, kv_heads=2)],
    "fixed_qk_attention": [
        Case(projections, {"length": 20, "position": swap.Rope()}, kv_heads=2),
        Case(projections, {"source": "static", "position": swap.Rope()}),
    ],
    "gated_mlp_mixer": [
        Case(lambda d, h, k, p: 3 * d * round((projections(d, h, k, p)) / (3 * d)), readable=False),
        Case(lambda d, h, k, p: 3 * d * 7, {"hidden": 7}, readable=False),
    ],
    "self_gate_attention": [
        Case(projections, kv_heads=2),
        Case(lambda d, h, k, p: projections(d, h, k, p) + 2 * p, {"qk_norm": True}),
    ],
    "taylor_attention": [
        Case(projections, kv_heads=2),
        Case(projections, {"normalize": "per_order"}, kv_heads=2),
        Case(projections, {"order": 3, "normalize": "per_order"}, tolerance=1e-7),
    ],
    "head_embedding_attention": [
        Case(embedded, {"mode": "mul"}),
        Case(embedded, {"mode": "add", "position": swap.Alibi()}),
        Case(embedded, {"mode": "mul", "position": swap.Rope()}),
        Case(embedded, {"mode": "add", "position": swap.Rope()}),
    ],
    "mixture_of_head_attention": [
        Case(lambda d, h, k, p: projections(d, h, k, p) + d * (h + 2), {"position": swap.Rope()}, kv_heads=2),
        Case(projections, {"router": "qnorm", "position": swap.Rope()}),
    ],
    "multi_query_attention": [Case(projections, {"position": swap.Rope()})],
    "multi_token_attention": [
        Case(
            lambda d, h, k, p: projections(d, h, k, p) + 2 * h * 3 * 5 + 2 * h * h + p + p + 1,
            {"c_q": 3, "c_k": 5, "position": swap.Rope()},
            kv_heads=2,
        ),
        Case(lambda d, h, k, p: projections(d, h, k, p) + h * 2 * 3, MULTI_TOKEN_PRE | {"c_q": 2, "c_k": 3}),
    ],
    "biased_attention": [
        Case(lambda d, h, k, p: projections(d, h, k, p) + k * p, {"position": swap.Rope()}, kv_heads=2),
        Case(lambda d, h, k, p: projections(d, h, k, p) + 2 * p, {"v_bias": True, "per_head": False}),
        Case(lambda d, h, k, p: projections(d, h, k, p) + k * p, {"k_bias": False, "v_bias": True}, kv_heads=2),
    ],
    "expanding_attention": [Case(projections), Case(projections, {"tol": 0.05, "position": swap.Rope()}, kv_heads=2)],
    "kernel_attention": [
        Case(projections, {"kernel": "identity", "normalise": True, "position": swap.Rope()}, kv_heads=2),
        Case(projections, {"kernel": "elu1", "normalise": True}),
        Case(lambda d, h, k, p: projections(d, h, k, p) + 2 * p * (p + 1), {"kernel": "mlp"}),
    ],
    "multi_hop_attention": [
        Case(lambda d, h, k, p: projections(d, h, k, p) + d * k * p, {"position": swap.Rope()}, kv_heads=2),
        Case(lambda d, h, k, p: projections(d, h, k, p) + d * k * p, {"prior": "alibi", "edge": "bernoulli"}),
    ],
    "score_activation": [
        Case(projections, {"function": "sigmoid", "position": swap.Rope()}, kv_heads=2),
        Case(projections, {"function": "elu1", "normalise": True}),
    ],
    "sigmoid_attention": [
        Case(lambda d, h, k, p: projections(d, h, k, p) + 2 * p, {"b": -2.5}, kv_heads=2),
        Case(lambda d, h, k, p: projections(d, h, k, p) + 2 * d, OUTSIDE_SIGMOID),
    ],
    "softmax_ablation": [
        Case(projections, kv_heads=2),
        Case(lambda d, h, k, p: projections(d, h, k, p) + 2 * p + (d + 1) * (h + k), GATED_SOFTMAX),
        Case(projections, {"normaliser": "clamp"}),
        Case(projections, {"numerator": "taylor", "order": 4, "normaliser": "sum"}),
    ],
    "structural_attention": [
        Case(projections, {"prior": lambda i, j: -0.3 * (i - j).abs(), "position": swap.Rope()}, kv_heads=2),
        Case(projections, {"prior": "alibi", "edge": "bernoulli"}),
        Case(projections, {"prior": "geometric_beta"}),
    ],
    "taylor_rnn": [
        Case(projections, kv_heads=2),
        Case(lambda d, h, k, p: projections(d, h, k, p) + p + (d + 1) * h, {"normaliser": "rms", "out_gate": True}),
        Case(projections, {"order": 3, "normaliser": "clamp"}),
    ],
    "triadic_attention": [
        Case(lambda d, h, k, p: 3 * d * d, {"topk": 4}),
        Case(
            lambda d, h, k, p: 4 * d * d,
            {"topk": 3, "latents": 2, "rule_qk": "ad", "rule_v": "latent_awake", "iterations": 2, "out_proj": True},
        ),
        Case(lambda d, h, k, p: 3 * d * d, {"topk": 2, "rule_qk": "ad_awake", "bound": "half"}),
    ],
    "neural_attention": [
        Case(lambda d, h, k, p: projections(d, h, k, p) + shared_mlp(p, 2), {"position": swap.Rope()}, kv_heads=2),
        Case(
            lambda d, h, k, p: projections(d, h, k, p) + h * shared_mlp(p, 4),
            {"proj_dim": 4, "share_heads": False, "act": "gelu", "tile": 5},
        ),
    ],
    "nexus_attention": [
        Case(projections, {"position": swap.Rope()}, kv_heads=2),
        Case(lambda d, h, k, p: projections(d, h, k, p) + 2, {"order": 3, "inner": "self", "gate": 0.5}, kv_heads=2),
        Case(projections, {"inner": "full", "position": swap.Rope()}, kv_heads=2),
        Case(
            lambda d, h, k, p: 4 * d * h * p + 4 * d * k * p,
            {"shared": False},
            kv_heads=2,
        ),
    ],
    "dual_attention": [
        Case(
            lambda d, h, k, p: d * d + 2 * d * k * p + d * d // 2 + d * d + 4 * p + (d + 19) * d,
            {"symbols": swap.SymbolicAttention(DIM, 2, 9), "position": swap.Rope()},
            kv_heads=2,
        ),
        Case(None, {"relational": 4, "relations": 2, "symmetric": True, "act": "relu", "symbols": "position"}),
        Case(None, {"share_qk": True, "symbols": swap.RelativeSymbols(DIM, 3)}),
        Case(projections, {"relational": 0}, kv_heads=2),
    ],
    "label_attention": [
        Case(lambda d, h, k, p: h * p + 2 * h * p * d + p * d + d * d // h + 2 * d // h),
        Case(None, {"query": "token", "partitioned": True, "ffn": 24, "value_dim": 6, "head_dim": 10}),
        Case(lambda d, h, k, p: h * p + 3 * h * p * d + 2 * d, {"combine": "concat"}),
    ],
    "optimised_attention": [
        Case(lambda d, h, k, p: 3 * d * d, {"position": swap.Rope()}),
        Case(lambda d, h, k, p: 3 * d * d + 2 * d + d, {"bias": True, "normaliser": swap.Sigmoid(-2.0)}),
    ],
    "efficient_attention": [
        Case(lambda d, h, k, p: 2 * d * d),
        Case(lambda d, h, k, p: 2 * d * d, {"position": swap.Rope()}),
    ],
    "super_attention": [
        Case(lambda d, h, k, p: 2 * d * d + 20 * 20, {"max_len": 20}),
        Case(lambda d, h, k, p: 2 * d * d + h * 12 * 12, {"max_len": 12, "share": False, "position": swap.Rope()}),
    ],
    "positional_attention": [
        Case(lambda d, h, k, p: 2 * (12 * h * 12 + h * 12) + 2 * (d * d + d), {"length": 12}),
        Case(None, {"vectors": torch.randn(20, 6), "qk_dim": 4}, kv_heads=2),
    ],
    "smeared_key": [
        Case(lambda d, h, k, p: projections(d, h, k, p) + k, {"position": swap.Rope()}, kv_heads=2),
        Case(lambda d, h, k, p: projections(d, h, k, p) + k, {"smear": 0.0, "position": swap.Alibi()}),
    ],
    "token_aware_phase_attention": [
        Case(projections, kv_heads=2),
        Case(projections, {"phase": "linear", "alpha": 0.3, "theta": 0.25}),
    ],
}


def make(name: str, case: Case, causal: bool, seed: int = 0) -> swap.Mechanism:
    """In float64 and eval mode, with all parameters away from the special values they may start from."""
    torch.manual_seed(seed)
    made = swap.make(name, DIM, HEADS, causal=causal, kv_heads=case.kv_heads, **case.own).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
