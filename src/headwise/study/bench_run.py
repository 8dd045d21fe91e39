"""One run of the swap bench: one mechanism trained on one task from one seed, and what it is expected to cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.study.bench_specs import BASELINE, Spec
from headwise.study.bench_tasks import TASKS, Batch, BenchTask, quality
from headwise.study.hosts import matched
from headwise.study.train import Draw, Recipe, build, train

POINTS = 9
"""Of a learning curve, the start and the end among them."""
CALIBRATION = 4
"""Steps that a forecast trains; the first doesn't count."""
HEAD_DIM = 16


@dataclass(frozen=True)
class Setup:
    """What is equal for all runs of a bench. Heads are 16 wide; a feed-forward part is 4 times as wide as the model,
    or, with `params` "matched", as wide as makes the model as large as the one with softmax attention."""

    params: str = "matched"
    steps: int = 300
    lr: float = 3e-3
    dim: int = 64
    layers: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.params not in ("matched", "free"):
            raise HeadwiseError(f"params: matched or free; got {self.params!r}.")
        if self.dim < HEAD_DIM or self.dim % HEAD_DIM or self.layers < 1:
            raise HeadwiseError(
                f"dim: a multiple of {HEAD_DIM}, with at least one layer; got dim={self.dim}, layers={self.layers}."
            )
        Recipe(self.steps, self.lr)  # refuses what nothing can be trained with
        if not math.isfinite(self.lr):
            raise HeadwiseError(f"lr: a positive number; got {self.lr}.")
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:
            raise HeadwiseError(f"device: {self.device!r} can't be used here: {error}") from None

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def recipe(self) -> Recipe:
        """How all models are trained: AdamW, a tenth of the steps to warm up, then down to 0 along a half cosine."""
        return Recipe(self.steps, self.lr, warmup=self.steps // 10, decay="cosine")

    def model(self, spec: Spec, task: BenchTask, seed: int) -> nn.Module:
        """The host for a task, on its device."""
        hidden = 4 * self.dim

        def host(kind: Spec, width: int) -> nn.Module:
            return task.host(lambda layer: kind.make(self.dim, self.heads, task.causal), self.dim, self.layers, width)

        if self.params == "free" or spec.label == BASELINE:
            model = build(lambda: host(spec, hidden), seed)
        else:
            wanted = parameters(build(lambda: host(Spec.of(BASELINE), hidden)))
            model = matched(lambda width: build(lambda: host(spec, width), seed), wanted, hidden)
        return model.to(self.device)


@dataclass
class Clock:
    """Draws batches onto the model's device, and knows when: a step is the time from one draw to the next."""

    draw: Draw
    device: str

    def __post_init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def __call__(self, generator: torch.Generator) -> Batch:
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())
        return on(self.device, self.draw(generator))

    def milliseconds(self, stamps: list[float]) -> float:
        """Median of the steps after the first."""
        return 1000 * median(np.diff(stamps)[1:] if len(stamps) > 2 else np.diff(stamps))


def on(device: str, batch: Any) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train_one(spec: Spec, task_name: str, seed: int, setup: Setup) -> dict[str, Any]:
    """A row of the results. What can't be run or trained says so in `note`, and has no quality."""
    row: dict[str, Any] = {"mechanism": spec.label, "task": task_name, "seed": seed, "quality": None, "note": ""}
    task = TASKS[task_name]()
    if task.causal and not spec.kind.causal_too:
        return {**row, "note": "no causal form"}
    try:
        model = setup.model(spec, task, seed)
        clock = Clock(task.draw, setup.device)
        with torch.no_grad():  # what a mechanism learns from its first batch (a length) it knows from the start
            model.train()(**on(setup.device, task.draw(torch.Generator().manual_seed(seed))))
        points = sorted({round(step) for step in np.linspace(0, setup.steps, POINTS)})
        recipe = Recipe(**{**vars(setup.recipe), "seed": seed})
        trained = train(model, clock, recipe, keep=points)
        curve = [[step, round(quality(kept, task), 6)] for step, kept in trained.each()]
        memory = step_memory(model, on(setup.device, task.draw(torch.Generator().manual_seed(seed))))
    except Exception as error:  # one that fails must not stop the others: the table tells
        kind = "" if isinstance(error, HeadwiseError) else f"{type(error).__name__}: "
        return {**row, "note": f"failed: {kind}{' '.join(str(error).split())[:200]}"}
    return {
        **row,
        "quality": curve[-1][1],
        "parameters": parameters(model),
        "step_ms": round(clock.milliseconds(clock.wall), 3) if setup.steps > 1 else None,
        "processor_ms": round(clock.milliseconds(clock.processor), 3) if setup.steps > 1 else None,
        "memory_mb": round(memory / 1e6, 3),
        "curve": curve,
    }


def step_memory(model: nn.Module, batch: Batch) -> int:
    """Bytes that one training step takes beside the weights and the optimizer's state. On CUDA the peak of what is
    allocated; elsewhere, where nobody counts allocations, the tensors kept for the backward pass."""
    model.train()
    device = next(model.parameters()).device
    if device.type == "cuda":
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model(**batch).loss.backward()
        return torch.cuda.max_memory_allocated(device) - before
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch).loss.backward()
    return sum(size for place, size in kept.items() if place not in weights)


Job = tuple[Spec, str, int]
"""Mechanism, task, seed."""


def forecast(jobs: list[Job], setup: Setup) -> float:
    """Seconds the jobs will take one after another. Measured are a few steps of every mechanism on one task, and of
    softmax attention on every task, which says how the tasks compare."""
    short = Setup(**{**vars(setup), "steps": CALIBRATION})
    known: dict[tuple[str, str], float] = {}

    def step(spec: Spec, task_name: str) -> float:
        if (spec.label, task_name) not in known:
            row = train_one(spec, task_name, 0, short)
            known[spec.label, task_name] = (row.get("step_ms") or 0.0) / 1000
        return known[spec.label, task_name]

    baseline, total = Spec.of(BASELINE), 0.0
    first: dict[str, str] = {}
    for spec, task_name, _ in jobs:
        if TASKS[task_name].causal and not spec.kind.causal_too:
            continue
        home = first.setdefault(spec.label, task_name)
        plain = step(baseline, home)
        each = step(spec, home) * (step(baseline, task_name) / plain if plain else 1.0)
        total += each * (setup.steps + POINTS * 8 / 3)  # a held-out batch costs a third of a step
    return total
