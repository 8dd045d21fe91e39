"""What do attention's projections of values and keys do for accuracy, and a learned mix of tokens in their place?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from headwise import swap
from headwise.study.bench_tasks import Images, quality
from headwise.study.finding import Finding
from headwise.study.registry import study
from headwise.study.swap_train import count, fitted, host

PAPER = swap.OptimisedAttention.paper
DIM, HEADS, PATCHES = 32, 4, 16
KINDS: dict[str, Callable[[], nn.Module]] = {
    "standard": lambda: swap.Attention(DIM, HEADS),
    "optimised": lambda: swap.OptimisedAttention(DIM, HEADS),
    "efficient": lambda: swap.EfficientAttention(DIM, HEADS),
    "super": lambda: swap.SuperAttention(DIM, HEADS, max_len=PATCHES),
}
Order = Literal["as it is", "shuffled once", "shuffled each time"]


class ShuffledImages(Images):
    """Digits whose patches are in another order: one for all images, or a new one for each."""

    def __init__(self, order: Order):
        super().__init__()
        self.order: Order = order
        self.once = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(0))

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        return self.shuffled(super().draw(generator), generator)

    def held_out(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for batch in super().held_out():
            yield self.shuffled(batch, generator)

    def shuffled(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        x = batch["x"]
        if self.order == "as it is":
            return batch
        if self.order == "shuffled once":
            return batch | {"x": x[:, self.once]}
        order = torch.rand(x.shape[:2], generator=generator).argsort(1)
        return batch | {"x": x[torch.arange(len(x))[:, None], order]}


@study(
    "slim_projections",
    paper=PAPER,
    room="swap",
    claim="Attention without W_V and W_K is as accurate; a learned mix of tokens makes it better at a fixed length.",
)
def slim_projections(seeds: Sequence[int] = (0, 1, 2, 3, 4), steps: int = 300) -> Finding:
    """Which digit an image of 8 x 8 pixels shows (16 patches of 2 x 2, learned positions), two layers of width 32 and 4
    heads; share of right answers on images held out. The parts left out are not made up for elsewhere, as the claim is
    that they aren't missed. The control: the same with all images' patches in one other order, which a mix of places
    can learn, and in a new order for each image, which it can't."""
    wanted: dict[Order, tuple[str, ...]] = {
        "as it is": tuple(KINDS),
        "shuffled once": ("standard", "super"),
        "shuffled each time": ("standard", "super"),
    }
    right: dict[str, dict[str, list[float]]] = {order: {kind: [] for kind in kinds} for order, kinds in wanted.items()}
    sizes = {}
    for order, kinds in wanted.items():
        task = ShuffledImages(order)
        for kind in kinds:
            for seed in seeds:
                model = host(lambda _, kind=kind: KINDS[kind](), task, seed, DIM)  # type: ignore[misc]
                sizes[kind] = count(model)
                right[order][kind].append(quality(fitted(model, task, seed, steps), task))
    mean = {order: {kind: float(np.mean(v)) for kind, v in found.items()} for order, found in right.items()}
    plain = mean["as it is"]
    gain = {order: found["super"] - found["standard"] for order, found in mean.items()}
    alike = all(abs(plain[kind] - plain["standard"]) <= 0.01 for kind in ("optimised", "efficient"))
    better = gain["as it is"] >= 0.01 and gain["shuffled once"] >= 0.01 and gain["shuffled each time"] < 0.01
    return Finding(
        measured={"accuracy": right, "mean": mean, "gain_of_super": gain, "parameters": sizes},
        expected=(
            "Optimised and Efficient within 1 point of standard attention; Super at least 1 point above it, also with "
            "the patches shuffled once, and less than that with a new order for each image (means over seeds)."
        ),
        verdict="holds" if alike and better else "fails",
        reason=(
            "Right: " + ", ".join(f"{kind} {value:.1%} ({sizes[kind]:,})" for kind, value in plain.items())
            + " (parameters); Super above standard by "
            + ", ".join(f"{value:+.1%} {order}" for order, value in gain.items())
            + "."
        ),
        model=f"two-layer image models of width {DIM}, trained for {steps} steps",
        seeds=list(seeds),
    )  # fmt: skip


@study(
    "slim_projection_costs",
    paper=PAPER,
    room="swap",
    claim="Optimised attention has three quarters of the parameters, Efficient half of them, and each is faster.",
)
def slim_projection_costs(dim: int = 512, heads: int = 8, tokens: int = 128, rounds: int = 30) -> Finding:
    """One layer, causal, batches of 4, one thread: parameters, operations of the forward by their formulas and as
    PyTorch counts them, and processor seconds of a forward with a backward, the least of `rounds`, in turn."""
    kinds = {"standard": swap.Attention, "optimised": swap.OptimisedAttention, "efficient": swap.EfficientAttention}
    layers = {kind: make(dim, heads, causal=True) for kind, make in kinds.items()}
    x = torch.randn(4, tokens, dim, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for kind, layer in layers.items():
                seconds[kind].append(clocked(partial(pass_through, layer, x)))
    finally:
        torch.set_num_threads(threads)
    counted = {kind: counted_flops(layer, x[:1]) for kind, layer in layers.items()}
    sizes = {kind: layer.parameter_count for kind, layer in layers.items()}
    least = {kind: min(values) for kind, values in seconds.items()}
    share = {kind: size / sizes["standard"] for kind, size in sizes.items()}
    faster = least["efficient"] < least["optimised"] < least["standard"]
    holds = share["optimised"] == 0.75 and share["efficient"] == 0.5 and faster
    return Finding(
        measured={
            "parameters": sizes,
            "share_of_parameters": share,
            "flops": {kind: layer.flops(tokens) for kind, layer in layers.items()},
            "flops_counted": counted,
            "seconds": least,
        },
        expected="Exactly 3/4 and 1/2 of the parameters; Optimised takes less time than standard, Efficient the least.",
        verdict="holds" if holds else "fails",
        reason=(
            f"Parameters {share['optimised']:.2f} and {share['efficient']:.2f} of the standard layer's; a training "
            f"pass takes {least['optimised'] / least['standard']:.2f} and "
            f"{least['efficient'] / least['standard']:.2f} of its processor time at width {dim} and {tokens} tokens."
        ),
        model=f"single layers of width {dim}",
    )


@torch.no_grad()
def counted_flops(layer: nn.Module, x: Tensor) -> int:
    """Operations of the matrix products of a forward, as PyTorch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # the CPU's fused kernel isn't counted
        layer(x)
    return counter.get_total_flops()


def pass_through(layer: nn.Module, x: Tensor) -> None:
    layer(x).square().sum().backward()
    layer.zero_grad(set_to_none=True)


def clocked(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
