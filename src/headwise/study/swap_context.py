"""Are attention maps dense, and do they become sparser where a model gets the mean of all tokens for nothing?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from headwise import scan, swap
from headwise.attention import Entropy, attend
from headwise.models import Opened, open_model
from headwise.study.bench_tasks import Images, quality
from headwise.study.finding import Finding
from headwise.study.photographs import PHOTOGRAPHS, photographs
from headwise.study.registry import study
from headwise.study.swap_train import fitted, host

PAPER = swap.ContextBroadcast.paper
PATCHES = 16


class Halved(nn.Module):
    """What context broadcasting does to a token's own part, without the mean: the control."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@study(
    "context_broadcast_entropy",
    paper=PAPER,
    room="swap",
    claim="Trained with context broadcasting an image model attends more sparsely, and is at least as accurate.",
)
def context_broadcast_entropy(
    seeds: Sequence[int] = (0, 1, 2, 3, 4), steps: int = 300, layers: int = 4, dim: int = 48, heads: int = 3
) -> Finding:
    """Digits of 8 x 8 pixels as 16 patches, on models that are otherwise the same: as they are, with CB or CB_S at the
    end of every feed-forward part, and with that part halved but no mean added (the control). Entropy of the heads over
    log 16 and share of right answers, on images held out; the time CB takes is of whole forwards in turn."""
    task = Images()
    ends: dict[str, Callable[[], nn.Module]] = {
        "plain": nn.Identity,
        "CB": swap.ContextBroadcast,
        "CB_S": lambda: swap.ContextBroadcast(dim, "scaled"),
        "halved": Halved,
    }

    def model_of(end: Callable[[], nn.Module], seed: int) -> nn.Module:
        model = host(lambda _: swap.Attention(dim, heads), task, seed, dim, layers)
        for block in model.blocks:
            block.mlp.append(end())
        return model

    entropy: dict[str, list[list[float]]] = {name: [] for name in ends}
    right: dict[str, list[float]] = {name: [] for name in ends}
    trained: dict[str, nn.Module] = {}
    for seed in seeds:
        for name, end in ends.items():
            trained[name] = fitted(model_of(end, seed), task, seed, steps, lr=1e-3)
            entropy[name].append(entropies(trained[name], task))
            right[name].append(quality(trained[name], task))
    mean = {name: np.mean(rows, 1) for name, rows in entropy.items()}
    accuracy = {name: float(np.mean(values)) for name, values in right.items()}
    sparser = bool((mean["CB"] < mean["plain"]).all())
    extra = extra_time(trained["plain"], trained["CB"], task)
    return Finding(
        measured={
            "normalised_entropy_by_layer": entropy,
            "normalised_entropy": mean,
            "accuracy": right,
            "mean_accuracy": accuracy,
            "extra_forward_time": extra,
        },
        expected="Mean normalised entropy is lower with CB on every seed, and mean accuracy at least that without it.",
        verdict="holds" if sparser and accuracy["CB"] >= accuracy["plain"] else "fails",
        reason=(
            "Normalised entropy and accuracy, means over seeds: "
            + ", ".join(f"{name} {np.mean(mean[name]):.3f} and {accuracy[name]:.1%}" for name in ends)
            + f"; lower with CB than without on {int((mean['CB'] < mean['plain']).sum())} of {len(seeds)} seeds."
        ),
        model=f"image models of {layers} layers and width {dim}, trained for {steps} steps",
        seeds=list(seeds),
    )


@torch.no_grad()
def entropies(model: nn.Module, task: Images) -> list[float]:
    """Mean normalised entropy of every layer."""
    batch = next(iter(task.held_out()))
    with attend(model, [Entropy()]) as run:
        model(x=batch["x"])
    values = next(iter(run.tree.children.values())).dataset["entropy"]
    return (values.mean(["sample", "head", "query"]).values / math.log(PATCHES)).tolist()


@torch.no_grad()
def extra_time(plain: nn.Module, broad: nn.Module, task: Images, rounds: int = 20) -> float:
    """How much longer a forward takes, as a share: the least processor time of each."""
    x = next(iter(task.held_out()))["x"]
    found: list[list[float]] = [[], []]
    for _ in range(rounds):
        for model, times in zip((plain, broad), found, strict=True):
            start = time.process_time()
            model(x=x)
            times.append(time.process_time() - start)
    return min(found[1]) / min(found[0]) - 1


@study(
    "attention_density",
    paper=PAPER,
    room="scan",
    claim="Most heads of a vision transformer are dense: near the largest entropy there is.",
)
def attention_density(opened: Opened | None = None, crops: int = 8, seed: int = 0) -> Finding:
    """The entropy of rows over its largest value, by layer, on crops of photographs. The paper looks at supervised
    transformers; the zoo's model has learned without labels, and has sinks, which make rows sparse."""
    opened = open_model("zoo:vit") if opened is None else opened
    size = opened.model.config.image_size
    size = min(size if isinstance(size, int) else size[0], 224)
    pixels = photographs(PHOTOGRAPHS, crops, size, seed)
    inputs = [{"pixel_values": crop[None]} for crop in pixels]
    heads = scan.heads(opened, inputs=inputs, questions=[scan.Density()]).heads
    by_layer = heads.groupby("layer")["density"].mean()
    dense = float((heads["density"] > 0.8).mean())
    return Finding(
        measured={
            "density_by_layer": by_layer.tolist(),
            "share_of_heads_above_0.8": dense,
            "dense_rows": float(heads["dense_rows"].mean()),
            "softmax_slope_by_layer": heads.groupby("layer")["softmax_slope"].mean().tolist(),
        },
        expected="More than half of the heads have a mean normalised entropy above 0.8.",
        verdict="holds" if dense > 0.5 else "fails",
        reason=(
            f"{dense:.0%} of the {len(heads)} heads are above 0.8; by layer the mean goes from {by_layer.min():.2f} "
            f"(layer {by_layer.idxmin()}) to {by_layer.max():.2f} (layer {by_layer.idxmax()})."
        ),
        model=opened.name,
        seeds=[seed],
    )
