"""What does a language model need of attention: that it mixes tokens at all, or that the mixing depends on the input?

All variants are one Qwen2 decoder. "fixed": the query and key matrices are frozen at 0 and only their biases learn, so
that, turned by the rotary embedding, every head has a learnt map of distances that is the same for all inputs. "none":
a sliding window of one token, so that no layer of this kind sees another token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from headwise import scan
from headwise.models import open_model
from headwise.scan.mixing import PAPER
from headwise.scan.needles import haystack
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.train import Recipe, build, characters, loss_of, train, windows

LENGTH = 64
LAYERS = 4
VARIANTS = {
    "standard": {},
    "fixed": {0: "fixed", 1: "fixed", 2: "fixed", 3: "fixed"},
    "none": {0: "none", 1: "none", 2: "none", 3: "none"},
    "fixed_hybrid": {0: "fixed", 2: "fixed"},
    "none_hybrid": {0: "none", 2: "none"},
}
"""What each layer is where it is no standard one; the hybrids keep every second layer standard, as the paper does."""


@study(
    "mixing_principles",
    paper=PAPER,
    room="scan",
    claim="Mixing tokens is indispensable, its dependence on the input much less, least of all in half of the layers.",
)
def mixing_principles(seeds: Sequence[int] = (0, 1, 2), steps: int = 400) -> Finding:
    """Loss on the last tenth of the shipped prose, read as characters, after the same training. Beside it the
    indicators of the layers that are standard in all but the uniform variants. The nearest small thing to the paper's:
    maps fixed by position stand for its three kinds of maps that don't depend on the input, and "none" has its values
    but no further MLP in their place."""
    ids, alphabet = characters(haystack())
    cut = len(ids) * 9 // 10
    data, held = (windows(part, rows=16, length=LENGTH) for part in (ids[:cut], ids[cut:]))
    inputs = {"input_ids": held(torch.Generator().manual_seed(1))["input_ids"]}
    rows = []
    for seed in seeds:
        for name, kinds in VARIANTS.items():
            model = build(lambda kinds=kinds: decoder(len(alphabet), kinds), seed)
            train(model, data, Recipe(steps, 3e-3, warmup=20, decay="cosine", seed=seed))
            row = {"variant": name, "seed": seed, "loss": loss_of(model, held, batches=20, seed=2)}
            rows.append(row | indicators(model, inputs, layers=[1, 3]))
    return conclude(rows, steps)


def conclude(rows: Sequence[dict[str, Any]], steps: int) -> Finding:
    """The verdict on the losses of all runs. A gap is only closed where there is one."""
    loss = pd.DataFrame(rows).pivot(index="seed", columns="variant", values="loss")
    order = (loss["standard"] < loss["fixed"]) & (loss["fixed"] < loss["none"])
    mean = loss.mean()
    cost = {kind: mean[kind] - mean["standard"] for kind in ("fixed", "none")}
    closed = {kind: (mean[kind] - mean[f"{kind}_hybrid"]) / gap if gap > 0 else None for kind, gap in cost.items()}
    holds = (
        bool(order.all())
        and cost["none"] > 2 * cost["fixed"]
        and all(share is not None and share > 0.5 for share in closed.values())
    )
    said = {
        kind: "so a model this small has no gap to close" if share is None else f"its hybrid closes {share:.0%} of that"
        for kind, share in closed.items()
    }
    return Finding(
        measured={"runs": rows, "loss": mean.to_dict(), "cost": cost, "gap_closed_by_hybrid": closed},
        expected=(
            "With every seed standard below fixed below none; no mixing costs more than twice what fixed maps cost; "
            "the hybrids close more than half of the gap on average."
        ),
        verdict="holds" if holds else "fails",
        reason=(
            f"Loss {mean['standard']:.3f} with standard attention; with none {cost['none']:+.3f} ({said['none']}), "
            f"with maps fixed by position {cost['fixed']:+.3f} ({said['fixed']})."
        ),
        model=f"four-layer Qwen2 of characters, {steps} steps",
        seeds=sorted(loss.index),
    )


def decoder(vocabulary: int, kinds: dict[int, str]) -> nn.Module:
    """A Qwen2 decoder of `LAYERS` layers of 4 heads, 64 wide, with some layers "fixed" or "none"."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_sliding_window=True,
        sliding_window=1,
        layer_types=[
            "sliding_attention" if kinds.get(layer) == "none" else "full_attention" for layer in range(LAYERS)
        ],
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    for layer, kind in kinds.items():
        if kind == "fixed":
            attention = model.model.layers[layer].self_attn
            for part in (attention.q_proj, attention.k_proj):
                nn.init.zeros_(part.weight)
                part.weight.requires_grad_(False)
                nn.init.normal_(part.bias)  # at 0 both would stay there: each is the other's gradient
    return model


def indicators(model: nn.Module, inputs: dict[str, Any], layers: Sequence[int]) -> dict[str, float]:
    """The paper's eight indicators, averaged over the heads of some layers."""
    asked = [scan.Concentration(rows=LENGTH), "entropy", "positional_heads"]
    data = scan.heads(open_model(model), inputs=inputs, questions=asked).data.sel(stream="text", layer=layers)
    names = {"entropy": "entropy", "concentration": "concentration", "first": "sink", "head_diversity": "diversity"}
    names |= {f"focus_{lag}": f"focus_{lag}" for lag in range(4)}
    return {own: float(np.mean(data[name])) for name, own in names.items()}
