"""What packing, a beginning token and the length of the context in training do to the sink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional as F

from headwise import scan
from headwise.models import open_model
from headwise.paper import Paper
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.sink_language import BOS, SinkLanguage, small_llama
from headwise.study.train import Recipe, build, train

PAPER = Paper("Why do LLMs attend to the first token?", "2504.02732")
CONDITIONS = (
    ("none", "causal"),
    ("none", "document"),
    ("between", "causal"),
    ("between", "document"),
    ("fixed", "causal"),
    ("fixed", "document"),
)


@study(
    "sink_packing",
    paper=PAPER,
    room="scan",
    claim="With a fixed beginning token in training, removing it at inference costs much; without one, nothing moves.",
)
def sink_packing(seeds: Sequence[int] = (0, 1), steps: int = 300, length: int = 64) -> Finding:
    """One-layer decoders on packed documents of bigrams with back-copying, two a window: with no beginning token, one
    between documents, or one fixed at position 0; with earlier documents visible or hidden. Read on held-out windows:
    the most any head gives position 0 and the start of the second document, the loss, and the rise of the loss on the
    same tokens when position 0 is cut off."""
    rows = []
    for bos, mask in CONDITIONS:
        for seed in seeds:
            language = SinkLanguage(length=length, rows=16, documents=2, bos=bos, mask=mask)
            model = build(lambda language=language: small_llama(language), seed)
            train(model, language, Recipe(steps, lr=3e-3, warmup=20, seed=seed))
            rows.append({"bos": bos, "mask": mask, "seed": seed} | inspect(model, language, 10_000 + seed))
    table = {f"{bos}_{mask}": [r for r in rows if (r["bos"], r["mask"]) == (bos, mask)] for bos, mask in CONDITIONS}
    mean = {
        name: {key: float(np.mean([r[key] for r in runs])) for key in ("first", "second_document", "loss", "rise")}
        for name, runs in table.items()
    }
    fixed = min(r["rise"] for r in table["fixed_causal"])
    none = max(r["rise"] for r in table["none_causal"])
    return Finding(
        measured=mean,
        expected="On every seed the rise with a fixed beginning token is above 0.2 nats and 5 times that without one.",
        verdict="holds" if fixed > 0.2 and fixed > 5 * max(none, 0) else "fails",
        reason=(
            f"Cutting off position 0 raises the loss by at least {fixed:.3f} nats where training had a fixed beginning "
            f"token and by at most {none:.3f} where it had none; the largest share of position 0 is "
            f"{mean['fixed_causal']['first']:.2f} and {mean['none_causal']['first']:.2f}."
        ),
        model="small Llama trained here",
        seeds=list(seeds),
    )


@torch.no_grad()
def inspect(model: torch.nn.Module, language: SinkLanguage, seed: int) -> dict[str, float]:
    """Sinks and losses on one large held-out batch."""
    batch = dict(replace(language, rows=64)(torch.Generator().manual_seed(seed)))
    ids, half = batch.pop("input_ids"), language.length // language.documents
    batch.pop("labels")
    question = scan.Sinks(positions=language.length)
    found = scan.heads(open_model(model), inputs=[{"input_ids": ids, **batch}], questions=[question])
    alpha = found.data["sink_alpha"].isel(stream=0)
    whole = token_losses(model, ids, batch)
    short = {name: x[..., 1:, 1:] for name, x in batch.items()}
    cut = token_losses(model, ids[:, 1:], short)
    # the loss of the first tokens depends on what could be seen of them: both are read from the fourth on
    judged = (ids[:, 1:] != BOS)[:, 3:]
    whole, cut = whole[:, 3:][judged], cut[:, 2:][judged]
    start = half if language.documents > 1 else 0
    return {
        "first": float(alpha.sel(position=0).max()),
        "second_document": float(alpha.sel(position=start).max()),
        "loss": float(whole.mean()),
        "rise": float(cut.mean() - whole.mean()),
    }


def token_losses(model: torch.nn.Module, ids: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of every token but the first, [row, token]."""
    logits = model(input_ids=ids, **batch).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@study(
    "sink_context",
    paper=PAPER,
    room="scan",
    claim="The longer the context in training, the stronger the sink, at equal numbers of tokens.",
)
def sink_context(seeds: Sequence[int] = (0, 1), lengths: Sequence[int] = (16, 64, 256), steps: int = 300) -> Finding:
    """One-layer decoders on bigrams with back-copying without a beginning token, trained with the same number of tokens
    in windows of different length. Read on windows of the longest length a model knows: the most any head gives the
    first token, over what uniform attention gives it there."""
    tokens, rows = 16 * 64, []
    for length in lengths:
        for seed in seeds:
            language = SinkLanguage(length=length, rows=max(1, tokens // length))
            model = build(lambda language=language: small_llama(language), seed)
            train(model, language, Recipe(steps, lr=3e-3, warmup=20, seed=seed))
            ids = replace(language, rows=32).window(torch.Generator().manual_seed(10_000 + seed))[0]
            table = scan.heads(open_model(model), inputs=[{"input_ids": ids}], questions=["sinks"]).heads
            even = float(np.mean(1 / np.arange(1, length + 1)))
            largest = float(table["sinks"].max())
            rate = float((table["sinks"] > 0.3).mean())
            rows.append(
                {"length": length, "seed": seed, "largest": largest, "over_uniform": largest - even, "rate": rate}
            )
    by_length = [[r["over_uniform"] for r in rows if r["length"] == length] for length in lengths]
    means = [float(np.mean(x)) for x in by_length]
    holds = all(max(a) < min(b) for a, b in pairwise(by_length)) and means[-1] > means[0] + 0.05
    return Finding(
        measured={"runs": rows, "lengths": list(lengths), "over_uniform": means},
        expected="More above uniform with every step in length, on every seed, and by 0.05 from the first to the last.",
        verdict="holds" if holds else "fails",
        reason=(
            f"In windows of {', '.join(map(str, lengths))} tokens the largest share of the first token is "
            f"{', '.join(f'{m:+.2f}' for m in means)} above uniform attention; the share of heads above 0.3 is at most "
            f"{max(r['rate'] for r in rows):.0%}, so that {steps} steps make "
            f"{'some' if any(r['rate'] for r in rows) else 'no'} sinks without a beginning token."
        ),
        model="small Llama trained here",
        seeds=list(seeds),
    )
