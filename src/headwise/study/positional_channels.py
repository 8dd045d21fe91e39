"""Do a few channels of the residual stream carry the position, and is it the causal mask that writes it there?"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.models import Opened, open_model
from headwise.paper import Paper
from headwise.scan.needles import haystack
from headwise.scan.positional_channels import mean_states, rank_channels
from headwise.scan.tokens import random_tokens
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.train import Recipe, build, characters, train, windows

PAPER = Paper("Mitigate Position Bias in Large Language Models via Scaling a Single Dimension", "2406.02536")
SHUFFLES = 20


@study(
    "positional_channels",
    paper=PAPER,
    room="scan",
    claim="On random tokens some channel of the hidden states is monotonic in position in a quarter of the layers.",
)
def positional_channels(
    model: Any = "zoo:llm",
    seeds: Sequence[int] = (0, 1),
    samples: int = 16,
    length: int = 1000,
    skip: int = 300,
    smooth_skip: int = 200,
) -> Finding:
    """The paper's search on two sets of random sequences. Controls: the states with their positions shuffled, in one
    order for all layers (20 orders), and in an order of its own for every layer."""
    opened = model if isinstance(model, Opened) else open_model(model)
    rows, found = [], []
    for seed in seeds:
        states = mean_states(opened, random_tokens(opened, samples, length, 100 + seed))
        table = rank_channels(states, skip, smooth_skip)
        found.append(set(table["channel"]))
        counts, smoothest = zip(
            *(searched(shuffled(states, s), skip, smooth_skip) for s in range(SHUFFLES)), strict=True
        )
        apart = [searched(shuffled(states, s, layers=True), skip, smooth_skip)[0] for s in range(SHUFFLES)]
        rows.append(
            {
                "seed": seed,
                "channels": len(table),
                "smoothest": table["channel"].head(10).tolist(),
                "layers_of_smoothest": table["layers"].head(10).tolist(),
                "smoothness": float(table["smoothness"].min()) if len(table) else None,
                "channels_shuffled": max(counts),
                "channels_shuffled_mean": np.mean(counts),
                "smoothness_shuffled": min((s for s in smoothest if s is not None), default=None),
                "channels_shuffled_by_layer": max(apart),
            }
        )
    holds = all(r["channels"] >= 1 and r["channels_shuffled"] == 0 for r in rows)
    return Finding(
        measured={"seeds": rows, "channels_of_all_seeds": len(set.intersection(*found)), "samples": samples},
        expected="On every seed at least one channel, and none in any shuffled order of the positions.",
        verdict="holds" if holds else "fails",
        reason=(
            f"{', '.join(str(r['channels']) for r in rows)} channels are monotonic in more than a quarter of the "
            f"layers; with shuffled positions {np.mean([r['channels_shuffled_mean'] for r in rows]):.1f} on average, "
            f"at most {max(r['channels_shuffled'] for r in rows)} in one order for all layers, at most "
            f"{max(r['channels_shuffled_by_layer'] for r in rows)} in an order for each layer."
        ),
        model=opened.name,
        seeds=list(seeds),
    )


def searched(states: Float[np.ndarray, "layer token channel"], skip: int, smooth_skip: int) -> tuple[int, float | None]:
    """How many channels the search finds, and the smoothest's measure."""
    table = rank_channels(states, skip, smooth_skip)
    return len(table), float(table["smoothness"].min()) if len(table) else None


def shuffled(
    states: Float[np.ndarray, "layer token channel"], seed: int, layers: bool = False
) -> Float[np.ndarray, "layer token channel"]:
    """The states with their positions in a random order: the same one in all layers, or one for each."""
    draw = np.random.default_rng(seed)
    if layers:
        return np.stack([x[draw.permutation(len(x))] for x in states])
    return states[:, draw.permutation(states.shape[1])]


@study(
    "positional_channels_mask",
    paper=PAPER,
    room="scan",
    claim="A causal model without position embeddings has positional channels; one that sees all tokens has none.",
)
def positional_channels_mask(
    seeds: Sequence[int] = (0, 1), steps: int = 150, samples: int = 300, length: int = 128
) -> Finding:
    """Two GPT-2 models of 8 layers and width 48 with their position embeddings held at 0, trained on the characters of
    a novel: one causal on the next character, one that sees all tokens on masked characters. The search starts at 30%
    (and 20%) of the positions, as in the paper. A model has positional channels if the search finds more than in each
    of 20 shuffled orders of its positions: some channels pass by chance."""
    rows = []
    for seed in seeds:
        for causal in (True, False):
            model, alphabet, loss = trained(causal, steps, length, seed)
            draw = torch.Generator().manual_seed(1000 + seed)
            ids = torch.randint(alphabet, (samples, length), generator=draw)
            states = mean_states(open_model(model), ids, batch=50)
            skips = round(0.3 * length), round(0.2 * length)
            count = searched(states, *skips)[0]
            chance = [searched(shuffled(states, s), *skips)[0] for s in range(SHUFFLES)]
            rows.append({"seed": seed, "causal": causal, "channels": count, "shuffled": max(chance), "loss": loss})
    holds = all((r["channels"] > r["shuffled"]) == r["causal"] for r in rows)
    one, all_ = ([f"{r['channels']} ({r['shuffled']})" for r in rows if r["causal"] == c] for c in (True, False))
    return Finding(
        measured={"models": rows},
        expected="On every seed more channels than in any shuffled order for the causal model, not more for the other.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Of 48 channels, at most by chance in brackets: causal {', '.join(one)}; seeing all tokens "
            f"{', '.join(all_)}."
        ),
        model="GPT-2 of 8 layers without positions, trained here",
        seeds=list(seeds),
    )


class Unplaced(nn.Module):
    """A small GPT-2 whose position embeddings are 0: causal, or with every token seen by every other."""

    def __init__(self, vocabulary: int, causal: bool, length: int, layers: int = 8, width: int = 48):
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        config = GPT2Config(vocab_size=vocabulary, n_positions=length, n_layer=layers, n_embd=width, n_head=4)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        self.inner, self.causal = GPT2LMHeadModel(config), causal
        nn.init.zeros_(self.inner.transformer.wpe.weight).requires_grad_(False)

    def forward(self, input_ids: Int[Tensor, "row token"], labels: Int[Tensor, "row token"] | None = None) -> Any:
        rows, length = input_ids.shape
        seen = None if self.causal else torch.ones(rows, 1, length, length, dtype=torch.bool, device=input_ids.device)
        logits = self.inner(input_ids=input_ids, attention_mask=seen, use_cache=False).logits
        loss = None
        if labels is not None:
            guess, truth = (logits[:, :-1], labels[:, 1:]) if self.causal else (logits, labels)
            loss = F.cross_entropy(guess.flatten(0, 1), truth.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def trained(causal: bool, steps: int, length: int, seed: int) -> tuple[nn.Module, int, float]:
    """The model, the size of its alphabet (without the mask, the last number), and its loss at the end."""
    ids, alphabet = characters(haystack())
    plain = windows(ids, rows=16, length=length)

    def masked(generator: torch.Generator) -> dict[str, Tensor]:
        batch = plain(generator)["input_ids"]
        hidden = torch.rand(batch.shape, generator=generator) < 0.15
        return {
            "input_ids": batch.masked_fill(hidden, len(alphabet)),
            "labels": batch.masked_fill(~hidden, -100),
        }

    model = build(lambda: Unplaced(len(alphabet) + 1, causal, length), seed)
    done = train(model, plain if causal else masked, Recipe(steps=steps, lr=3e-3, warmup=20, seed=seed))
    return done.model, len(alphabet), float(done.losses[-20:].mean())
