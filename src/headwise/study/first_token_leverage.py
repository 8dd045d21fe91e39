"""Is the first token a stronger lever on what a model says than any other token, and in which layers?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.models import Opened, Segments, open_model
from headwise.steer import Method, TokenScale, apply
from headwise.steer.method import every_head
from headwise.study.finding import Finding
from headwise.study.first_token_gain import PAPER, interval, prose_perplexity
from headwise.study.registry import study
from headwise.study.sinks import windows


@study(
    "zero_tuning_leverage",
    paper=PAPER,
    room="steer",
    claim="A gain on the first token moves what a model says more than on another token, most in early layers.",
)
def zero_tuning_leverage(
    model: Any = "zoo:llm", texts: int = 24, length: int = 16, gains: Sequence[float] = (0.5, 2.0), seed: int = 0
) -> Finding:
    """KL divergence (nats) of the next-token distribution at the end of windows of a novel from the plain one, with one
    gain on the attention of all heads to one token: the first, or each of the others in turn (mean); and to the first
    token in the early, the middle and the late third of the layers alone. Beside it the perplexity of prose with these
    gains on the first token of every window, and on the second one for comparison."""
    opened = model if isinstance(model, Opened) else open_model(model)
    ids = windows(opened, texts, length).to(opened.device)
    plain = ends(opened, ids, [])
    every = every_head(opened)
    cuts = np.linspace(0, 1 + max(layer for layer, _ in every), 4).round().astype(int)
    thirds = {n: range(*cuts[i : i + 2]) for i, n in enumerate(("early", "middle", "late"))}
    layers = {name: [pair for pair in every if pair[0] in some] for name, some in thirds.items()}
    rows, prose = [], {"plain": prose_perplexity(opened, 1.0)}
    for gain in gains:
        moved = {"first": kl(plain, ends(opened, ids, [TokenScale(gain=gain)]))}
        others = []
        for place in range(1, length):
            segments = Segments.from_spans({"token": (place, place + 1)}, length)
            others.append(kl(plain, ends(opened, ids, [TokenScale("token", gain)], segments)))
        moved["others"] = np.mean(others, 0)
        for name, heads in layers.items():
            moved[name] = kl(plain, ends(opened, ids, [TokenScale(gain=gain, heads=heads)]))
        rows.append((gain, moved))
        prose[f"{gain:g}"] = {
            "first": prose_perplexity(opened, gain),
            "second": prose_perplexity(opened, gain, place=1),
            **{name: prose_perplexity(opened, gain, heads=heads) for name, heads in layers.items()},
        }
    more = [interval((m["first"] - m["others"])[:, None])[1][0] for _, m in rows]
    early = [interval((m["early"] - m["late"])[:, None])[1][0] for _, m in rows]
    holds = min(more) > 0 and min(early) > 0
    means = {f"{gain:g}": {name: x.mean() for name, x in moved.items()} for gain, moved in rows}
    return Finding(
        measured={"kl": means, "first_over_others_low": more, "early_over_late_low": early, "perplexity": prose},
        expected="At every gain the first token moves more than the mean other token, and the early third of layers "
        "more than the late third, both with 95% certainty.",
        verdict="holds" if holds else "fails",
        reason="; ".join(
            f"at gain {gain} the first token moves the output by {m['first']:.4f} nats, another by {m['others']:.4f}; "
            f"the first token in early, middle and late layers by {m['early']:.4f}, {m['middle']:.4f}, {m['late']:.4f}"
            for gain, m in means.items()
        )
        + ".",
        model=opened.name,
        seeds=[seed],
    )


@torch.no_grad()
def ends(
    opened: Opened, ids: Int[Tensor, "text token"], methods: Sequence[Method], segments: Segments | None = None
) -> Float[Tensor, "text vocabulary"]:
    """Log-probabilities after the last token."""
    if not methods:
        return opened.model(input_ids=ids).logits[:, -1].float().log_softmax(-1)
    with apply(opened, *methods, segments=segments):
        return opened.model(input_ids=ids).logits[:, -1].float().log_softmax(-1)


def kl(plain: Float[Tensor, "text word"], changed: Float[Tensor, "text word"]) -> Float[np.ndarray, " text"]:
    return (plain.exp() * (plain - changed)).sum(-1).cpu().numpy()
