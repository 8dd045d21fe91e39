"""Does attention entropy dip and come back while a small transformer is trained on a book?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from headwise import scan
from headwise.scan.needles import haystack
from headwise.scan.trajectory import PAPER
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.train import Recipe, build, characters, loss_of, train, windows

LENGTH = 35


@study(
    "entropy_dip_and_rise",
    paper=PAPER,
    room="scan",
    claim="In training the attention of lower layers gets sparse, then denser again; not so without a nonlinearity.",
)
def entropy_dip_and_rise(
    seeds: Sequence[int] = (0, 1), rates: Sequence[float] = (1e-3, 3e-3), steps: int = 800, each: int = 50
) -> Finding:
    """Two one-head layers on the characters of the shipped prose, with ReLU and with no nonlinearity in the
    feed-forward part, at each learning rate. A run dips and rises where the first layer's entropy falls by 0.05 nats or
    more and comes back by a tenth of that or more. The last tenth of the text is held out."""
    ids, alphabet = characters(haystack())
    cut = len(ids) * 9 // 10
    data, held = (windows(part, rows=20, length=LENGTH) for part in (ids[:cut], ids[cut:]))
    inputs = {"input_ids": held(torch.Generator().manual_seed(1))["input_ids"]}
    rows: list[dict[str, Any]] = []
    for activation in ("relu", "linear"):
        for rate in rates:
            for seed in seeds:
                model = build(lambda activation=activation: small(len(alphabet), activation), seed)
                trained = train(model, data, Recipe(steps, rate, seed=seed), keep=range(0, steps + 1, each))
                seen = scan.entropy_trajectory(trained.each(), inputs)
                shape = scan.dip_and_rise(seen["entropy"].mean("head"))
                dip, rise = (shape[name].values for name in ("dip", "rise"))
                rows.append(
                    {
                        "activation": activation,
                        "rate": rate,
                        "seed": seed,
                        "dip": dip,
                        "rise": rise,
                        "lowest_step": shape["lowest"].values,
                        "bounced": bool(dip[0] >= 0.05 and rise[0] >= 0.1 * dip[0]),
                        "stable_rank": seen["stable_rank"].isel(step=[0, -1]).values,
                        "held_out_loss": loss_of(model, held, batches=10, seed=2),
                    }
                )
    return conclude(rows, steps)


def conclude(rows: Sequence[dict[str, Any]], steps: int) -> Finding:
    """The verdict on all runs, from how many of each kind came back."""
    share = {
        kind: sum(row["bounced"] for row in rows if row["activation"] == kind) / (len(rows) / 2)
        for kind in ("relu", "linear")
    }
    falling = sum(int(row["lowest_step"][0] == steps) for row in rows)
    return Finding(
        measured={"runs": rows, "share_bounced": share},
        expected="The first layer dips and rises in more than half of the runs with ReLU, in fewer than half without.",
        verdict="holds" if share["relu"] > 0.5 > share["linear"] else "fails",
        reason=(
            f"The first layer's entropy dips and rises in {share['relu']:.0%} of the runs with ReLU and in "
            f"{share['linear']:.0%} of those without a nonlinearity; in {falling} of {len(rows)} runs it is lowest at "
            "the end, so that a rise may still come: the paper trains far longer."
        ),
        model=f"two-layer one-head GPT-2 of characters, {steps} steps",
        seeds=sorted({row["seed"] for row in rows}),
    )


def small(vocabulary: int, activation: str) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=LENGTH,
        n_embd=64,
        n_inner=64,
        n_layer=2,
        n_head=1,
        activation_function=activation,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)
