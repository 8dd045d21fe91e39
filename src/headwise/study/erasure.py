"""Does attention say which tokens matter? The debate of the survey's section on interpretation, measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from headwise.attention import Map, attend
from headwise.models import Opened, open_model
from headwise.scan.needs import quiet
from headwise.scan.vocabulary import ATTENTION
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.sinks import windows


@study(
    "attention_and_erasure",
    paper=ATTENTION,
    room="scan",
    claim="Attention weights tell which tokens matter: erasing the more attended ones changes the output more.",
)
def attention_and_erasure(model: Any = "zoo:llm", texts: int = 24, length: int = 48, seed: int = 0) -> Finding:
    """In windows of prose, for every token but the first and the last: the attention it gets from the last token (mean
    over all heads) and how much the next-token distribution changes (KL, nats) when no token can see it any more.
    Spearman's correlation of the two, a window. Controls: nearness to the end instead of attention, and the attention
    of another window. The survey reports the debate, no number. Rule: the mean correlation is above 0.3, and in at
    least 3 of 4 windows above that of nearness. With the first token, the sink, it is reported beside."""
    opened = model if isinstance(model, Opened) else open_model(model)
    ids = windows(opened, texts, length).to(opened.device)
    seen = [attended(opened, row) for row in ids]
    moved = [erased(opened, row) for row in ids]
    near = np.arange(length - 1)
    inner = slice(1, None)
    by_attention = [spearman(a[inner], m[inner]) for a, m in zip(seen, moved, strict=True)]
    by_nearness = [spearman(near[inner], m[inner]) for m in moved]
    order = np.random.default_rng(seed).permutation(texts)
    other = np.where(order == np.arange(texts), (order + 1) % texts, order)
    by_other = [spearman(seen[k][inner], m[inner]) for k, m in zip(other, moved, strict=True)]
    wins = float(np.mean(np.array(by_attention) > np.array(by_nearness)))
    mean = float(np.mean(by_attention))
    holds = mean > 0.3 and wins >= 0.75
    return Finding(
        measured={
            "spearman": mean,
            "spearman_nearness": np.mean(by_nearness),
            "spearman_other_window": np.mean(by_other),
            "spearman_with_first": np.mean([spearman(a, m) for a, m in zip(seen, moved, strict=True)]),
            "windows_above_nearness": wins,
            "first_token": {
                "attention": np.mean([a[0] for a in seen]),
                "share_of_change": np.mean([m[0] / m.sum() for m in moved]),
            },
        },
        expected="A mean correlation above 0.3, and above that of nearness to the end in 3 of 4 windows.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Attention and the effect of erasing a token correlate at {mean:.2f}; nearness to the end alone at "
            f"{np.mean(by_nearness):.2f}, another window's attention at {np.mean(by_other):.2f}. Attention is the "
            f"better guide in {wins:.0%} of windows."
        ),
        model=opened.name,
        seeds=[seed],
    )


@torch.no_grad()
def attended(opened: Opened, ids: Int[Tensor, " token"]) -> Float[np.ndarray, " before"]:
    """The attention of the last token to each before it, mean over heads and layers."""
    with attend(opened, readings=[Map(queries=[len(ids) - 1], stream="text")]) as run:
        opened.model(input_ids=ids[None], **quiet(opened.model))
    return run.tree["text"]["map"].mean(("layer", "head")).values.reshape(-1)[: len(ids) - 1]


@torch.no_grad()
def erased(opened: Opened, ids: Int[Tensor, " token"]) -> Float[np.ndarray, " before"]:
    """KL of the next-token distribution from the one that is predicted when no token can see this one."""
    count = len(ids)
    mask = torch.ones(count, count, dtype=torch.long, device=ids.device)
    mask[: count - 1].fill_diagonal_(0)  # the last row sees all
    logits = opened.model(input_ids=ids.expand(count, -1), attention_mask=mask, **quiet(opened.model)).logits[:, -1]
    found = F.log_softmax(logits.double(), -1)
    whole = found[-1]
    return (whole.exp() * (whole - found[:-1])).sum(-1).cpu().numpy()


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of ranks; 0 where one of the two does not vary."""
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1]) if np.ptp(one) and np.ptp(other) else 0.0
