"""What a row of the matrix is, how its tiny model is built, and how the truth (eager attention) is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.modeling_utils import AttentionInterface

Batch = dict[str, Tensor]
Inputs = Callable[[object], Batch]


@dataclass(frozen=True)
class Family:
    """One tiny model: the transformers model type, what its config changes, and what it is fed."""

    name: str
    config: dict = field(default_factory=dict)
    head: str = "AutoModelForCausalLM"
    inputs: Inputs | None = None
    refused: tuple[str, ...] = ()  # parts of the names of attention layers that are written out by hand

    @property
    def id(self) -> str:
        return self.name if self.head.startswith("AutoModel") else f"{self.name}-{self.head}"


@dataclass
class Call:
    """One eager attention call: the module's dotted name, its weights, and the sizes of what it was given."""

    name: str
    weights: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def build(family: Family, implementation: str = "eager", seed: int = 0) -> nn.Module:
    """The family's model in eval mode with weights large enough that its attention is far from uniform."""
    if family.name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no model type {family.name!r}")
    torch.manual_seed(seed)
    try:
        config = CONFIG_MAPPING[family.name](**family.config)
    except ModuleNotFoundError as error:  # some releases import timm (and so torchvision) with the family
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    cls = getattr(transformers, family.head)
    make = cls.from_config if family.head.startswith("AutoModel") else cls._from_config
    return randomise(make(config, attn_implementation=implementation).eval(), seed)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every matrix gets unit gain, every vector a little noise: no zero-initialised part hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:
            fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 3 else parameter.shape[-1]
            parameter.copy_(noise / math.sqrt(fan_in))
    return model.requires_grad_(False)


def batch_of(family: Family, model: nn.Module) -> Batch:
    """The family's inputs, the same at every call."""
    torch.manual_seed(1)
    return (family.inputs or text)(model.config)


def text(config: object, padding: str = "left", n: int = 12) -> Batch:
    """Two sentences, the second three tokens shorter."""
    ids = torch.randint(8, 60, (2, n))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def right_padded(config: object) -> Batch:
    return text(config, padding="right")


def unpadded(config: object) -> Batch:
    return {"input_ids": torch.randint(8, 60, (2, 12))}


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """Collect every call that goes through transformers' attention interface, with the weights it returned."""
    names = {id(module): name for name, module in model.named_modules()}
    calls: list[Call] = []
    plain = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, implementation: str, default: Callable) -> Callable:
        inner = plain(self, implementation, default)

        def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> tuple:
            output, weights = inner(module, query, key, value, *args, **kwargs)
            calls.append(Call(names.get(id(module), "?"), effective(weights, value, output), query, key, value))
            return output, weights

        return spy

    AttentionInterface.get_interface = get_interface
    try:
        yield calls
    finally:
        AttentionInterface.get_interface = plain


def effective(weights: Tensor, value: Tensor, output: Tensor) -> Tensor:
    """The weights the output was made with: some families let a sink take its part after they took the weights."""
    made = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    output = output.transpose(1, 2)
    if torch.allclose(made, output, atol=1e-5):
        return weights
    part = (made * output).sum(-1, keepdim=True) / (made * made).sum(-1, keepdim=True)
    assert torch.allclose(made * part, output, atol=1e-5), "the output is not a multiple of weights times values"
    return weights * part


def tensors(output: object) -> list[Tensor]:
    """Every floating tensor of a model's output, in order; caches and integer outputs left out."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [found for key, value in output.items() if key != "attentions" for found in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [found for value in output for found in tensors(value)]
    return []


def furthest(mine: list[Tensor], theirs: list[Tensor], mask: Tensor | None = None) -> float:
    """The largest difference over valid tokens, relative to the output's own scale where that exceeds one."""
    assert [tuple(t.shape) for t in mine] == [tuple(t.shape) for t in theirs]
    worst = 0.0
    for a, b in zip(mine, theirs, strict=True):
        if mask is not None and a.shape[: mask.dim()] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        if a.numel() == 0 or torch.equal(a, b):
            continue
        gap = torch.where(a == b, torch.zeros_like(a), (a - b).abs())  # equal infinities do not differ
        size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0
        worst = max(worst, gap.max().item() / max(1.0, size) if not gap.isnan().any() else math.inf)
    return worst
