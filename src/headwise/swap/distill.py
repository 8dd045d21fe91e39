"""Layer-wise distillation: a mechanism learns what the layer that it replaced would have given.

    conversion = swap.convert(model, "sigmoid_attention")
    losses = swap.distill(conversion, batches, steps=500)    # pandas: a row a step, a column a layer

For every replaced layer l, with x the original layer's input in the original model and y its output,

    loss_l = sum |mechanism_l(x) - y|^2 / sum |y|^2

over the tokens that are not padding: 0 is perfect, 1 is as good as an output of zeros. The layers learn independently,
each from inputs that the others' errors have not reached, all of them in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.swap.adapter import Replacement
from headwise.swap.convert import Conversion, set_module

if TYPE_CHECKING:
    import pandas as pd


def distill(
    conversion: Conversion,
    batches: Sequence[Mapping[str, Any]],
    steps: int | None = None,
    lr: float = 1e-3,
    progress: bool = False,
) -> pd.DataFrame:
    """Trains the mechanisms of a conversion, in place, by AdamW along a half cosine from `lr` down to 0.

    `batches`: model inputs, on the model's device, taken in turn for `steps` updates (None: each once). What a
    mechanism adds to the loss (`aux_loss`) is added here too. Nothing else of the model changes: its own weights, its
    modes and its gradients stay, and the mechanisms are in their places afterwards. `progress`: a bar on the error
    stream. Returns the losses, a row a step, a column a layer.
    """
    import pandas as pd

    steps = len(batches) if steps is None else steps
    if not len(batches) or steps < 1 or lr <= 0:
        raise HeadwiseError(
            f"distill: wanted batches, at least one step and a positive lr; got {len(batches)} batches, steps={steps}, "
            f"lr={lr}."
        )
    model, replacements = conversion.model, standing(conversion)
    trained = [p for m in conversion.mechanisms.values() for p in m.parameters() if p.requires_grad]
    if not trained:
        raise HeadwiseError("distill: no parameter of the mechanisms wants a gradient.")
    gradients = [p.grad for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parts = (model, *conversion.originals.values())
    modes = {module: module.training for part in parts for module in part.modules()}
    rows = []
    with ExitStack() as stack:
        stack.callback(restore, model, replacements, modes, trained, gradients)
        conversion.undo()
        model.eval()
        losses: dict[str, float] = {}
        batch: Mapping[str, Any] = {}
        for name, replacement in replacements.items():
            replacement.train()
            hook = lesson(name, replacement, losses, lambda: batch)
            stack.callback(conversion.originals[name].register_forward_hook(hook, with_kwargs=True).remove)
        console = Console(stderr=True)
        for step in track(range(steps), "distill", console=console, transient=True, disable=not progress):
            batch = batches[step % len(batches)]
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                model(**batch)
            missed = [name for name in replacements if name not in losses]
            if missed:
                raise HeadwiseError(f"distill: batch {step % len(batches)} didn't call {', '.join(missed)}.")
            rows.append(dict(losses))
            losses.clear()
            optimizer.step()
            schedule.step()
    return pd.DataFrame(rows, columns=list(replacements)).rename_axis(index="step", columns="layer")


def standing(conversion: Conversion) -> dict[str, Replacement]:
    """What stands in the places of the original layers."""
    found = {name: conversion.model.get_submodule(name) for name in conversion.mechanisms}
    gone = [name for name, module in found.items() if not isinstance(module, Replacement)]
    if gone:
        raise HeadwiseError(f"distill: the conversion was undone: {', '.join(gone)} is the model's own layer again.")
    return found  # type: ignore[return-value]


def lesson(
    name: str, replacement: Replacement, losses: dict[str, float], batch: Callable[[], Mapping[str, Any]]
) -> Callable[..., None]:
    """A hook on the original layer: it lets the replacement do the same call, and learn from the difference."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        call = {key: value for key, value in kwargs.items() if key != "past_key_values"}
        with torch.enable_grad():
            loss = error(replacement(*args, **call)[0], y, tokens_of(batch(), y))
            losses[name] = loss.item()
            extra = replacement.mechanism.aux_loss
            (loss if extra is None else loss + extra).backward()

    return hook


def error(
    given: Float[Tensor, "batch token dim"],
    wanted: Float[Tensor, "batch token dim"],
    kept: Bool[Tensor, "batch token"] | None,
) -> Float[Tensor, ""]:
    """The squared difference as a part of what is wanted."""
    if kept is not None:
        given, wanted = given[kept], wanted[kept]
    return (given.float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp(min=1e-12)


def tokens_of(batch: Mapping[str, Any], y: Tensor) -> Bool[Tensor, "batch token"] | None:
    """Which tokens are not padding, where the batch says so."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == y.shape[:2] else None


def restore(
    model: nn.Module,
    replacements: dict[str, Replacement],
    modes: dict[nn.Module, bool],
    trained: list[nn.Parameter],
    gradients: list[Tensor | None],
) -> None:
    for name, replacement in replacements.items():
        set_module(model, name, replacement)
    for module, training in modes.items():
        module.training = training
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
