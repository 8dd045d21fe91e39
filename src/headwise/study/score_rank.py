"""How many dimensions do heads choose by, and what can a head smaller than the text not do?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise import scan
from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened, open_model
from headwise.scan.needles import haystack
from headwise.scan.score_rank import construct, effective_rank, log_rank, rank_of, singular_values
from headwise.study.finding import Finding
from headwise.study.registry import study

PAPER = scan.ScoreRank.paper


@study(
    "low_rank_bottleneck",
    paper=PAPER,
    room="scan",
    claim="A head can attend by any pattern over n tokens if its head dim reaches n, and by few if it is smaller.",
)
def low_rank_bottleneck(
    tokens: int = 12, dims: Sequence[int] = tuple(range(2, 13)), seeds: Sequence[int] = (0, 1, 2)
) -> Finding:
    """Queries and keys of p dimensions, free for each token, are fitted (L-BFGS) to a random pattern of attention
    (Dirichlet(1) rows). Softmax ignores a constant per row, so that p = n - 1 is enough. The closed-form weights of
    p = n are checked beside."""
    loss = {p: [fit(pattern(tokens, seed), p, seed) for seed in seeds] for p in dims}
    exact = []
    for seed in seeds:
        target, x = pattern(tokens, seed), torch.randn(tokens, 2 * tokens, dtype=torch.float64)
        w_q, w_k = construct(target, x)
        made = torch.softmax(x @ w_q @ (x @ w_k).T / tokens**0.5, -1)
        exact.append((made - target).abs().max().item())
    worst = {p: max(v) if p >= tokens - 1 else min(v) for p, v in loss.items()}
    enough = [worst[p] for p in dims if p >= tokens - 1]
    short = [worst[p] for p in dims if p < tokens - 1]
    ranks = [log_rank(pattern(tokens, seed)) for seed in seeds]
    holds = max(enough) < 1e-6 < 1e-5 < min(short) and max(exact) < 1e-5
    return Finding(
        measured={
            "kl": {str(p): float(np.mean(v)) for p, v in loss.items()},
            "closed_form_error": max(exact),
            "log_rank": ranks,
        },
        expected=f"KL below 1e-6 from head dim {tokens - 1} on, above 1e-5 for every smaller one; closed form to 1e-5.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Over {tokens} tokens the fit leaves at most {max(enough):.1g} nats from head dim {tokens - 1} on and "
            f"at least {min(short):.1g} below; the closed form is off by {max(exact):.1g}."
        ),
        model=f"free queries and keys of {tokens} tokens",
        seeds=seeds,
    )


def pattern(tokens: int, seed: int) -> Float[Tensor, "token token"]:
    rows = np.random.default_rng(seed).dirichlet(np.ones(tokens), size=tokens)
    return torch.tensor(rows)


def fit(target: Float[Tensor, "token token"], dim: int, seed: int, steps: int = 60) -> float:
    """Mean KL(target || softmax(Q K^T)) over rows after fitting Q and K."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(len(target), dim, generator=draw, dtype=torch.float64).requires_grad_() for _ in "qk")
    optimizer = torch.optim.LBFGS(
        [q, k], max_iter=50, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        return (target * (target.log() - torch.log_softmax(q @ k.T, -1))).sum(-1).mean()

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(step)
    return max(loss().item(), 0.0)


@study(
    "score_rank_low",
    paper=PAPER,
    room="scan",
    claim="Most trained heads choose by far fewer dimensions than their head dim offers.",
)
def score_rank_low(models: Sequence[Any] = ("zoo:llm", "zoo:encoder", "zoo:vit"), tokens: int = 1024) -> Finding:
    """How many singular values hold 99% of the row-centred scores (squared): the median over heads, on one text or
    picture. Control: normally distributed queries and keys of the same sizes."""
    rows = {}
    for given in models:
        opened = given if isinstance(given, Opened) else open_model(given)
        batch, length = one_input(opened, tokens)
        found = scan.heads(opened, inputs=[batch], questions=[scan.ScoreRank()])
        dim = opened.sites[0].head_dim
        draw = torch.Generator().manual_seed(0)
        q, k = (torch.randn(length, dim, generator=draw, dtype=torch.float64) for _ in "qk")
        k = k - k.mean(0)
        flat = singular_values(q.T @ q, k.T @ k)
        table = found.heads
        rows[opened.name] = {
            "head_dim": dim,
            "tokens": length,
            "median_rank": table["score_rank"].median(),
            "median_rank_entropy": table["score_rank_entropy"].median(),
            "heads_below_half": (table["score_rank"] < dim / 2).mean(),
            "random_rank": int(rank_of(flat, 0.99)),
            "random_rank_entropy": float(effective_rank(flat)),
        }
    holds = all(row["heads_below_half"] > 0.5 for row in rows.values())
    named = "; ".join(
        f"{name}: median {row['median_rank']:.0f} of {row['head_dim']}, {row['heads_below_half']:.0%} below half "
        f"(random vectors: {row['random_rank']})"
        for name, row in rows.items()
    )
    return Finding(
        measured=rows,
        expected="In every model more than half of the heads need less than half of their dimensions for 99%.",
        verdict="holds" if holds else "fails",
        reason=f"{named}.",
        model=", ".join(rows),
    )


def one_input(opened: Opened, tokens: int) -> tuple[dict[str, Tensor], int]:
    """A long text, or a photograph of scikit-learn's, and how many tokens it has."""
    if opened.tokenizer is not None:
        most = min(tokens, opened.max_positions or tokens)
        batch = opened.encode(haystack(), truncation=True, max_length=most)
        return batch, batch["input_ids"].shape[1]
    if opened.processor is None:
        raise HeadwiseError(f"{opened.name} reads neither text nor pictures.")
    batch = opened.encode(need("sklearn.datasets", "analysis").load_sample_image("china.jpg"))
    side = batch["pixel_values"].shape[-1] // opened.model.config.patch_size
    return batch, side * side + 1
