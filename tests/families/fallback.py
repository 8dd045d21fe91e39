"""Models from outside transformers: timm, torch.nn and diffusers. They are reached by the function mode."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from .family import randomise


@dataclass(frozen=True)
class Bare:
    """A model made by a function, and the arguments it is called with."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    sites: int
    masked: bool = False

    @property
    def id(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return randomise(self.make().eval())

    def batch(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return self.inputs()


class _Blank(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """timm imports torchvision for its data loaders and one norm layer; none of that is used by the models here."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _blank_class(name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"


class _AnyConstant(type):
    """Any class attribute is its own name: enough for timm's `InterpolationMode.NEAREST` at import."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


def _blank_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyConstant(name, (nn.Module,), {})


def import_timm() -> types.ModuleType:
    """timm, where need be behind a blank torchvision that is gone again afterwards."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    finder = _Blank()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def timm_vit() -> nn.Module:
    return import_timm().create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5
    )


def timm_eva() -> nn.Module:
    import_timm()
    eva = importlib.import_module("timm.models.eva")
    return eva.Eva(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5, use_rot_pos_emb=True)


class SelfAttention(nn.Module):
    """One nn.MultiheadAttention over its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class Encoder(nn.Module):
    """nn.TransformerEncoder, which in eval mode without gradients takes torch's fused fast path."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


class Decoder(nn.Module):
    """nn.TransformerDecoder: causal self-attention and cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, batch_first=True), 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True)


def diffusion_transformer() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip


def stable_diffusion_3() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip


def sequence() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 9, 32)}


def padded_sequence() -> dict[str, Tensor]:
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    return sequence() | {"padding": padding}


def sequences() -> dict[str, Tensor]:
    return sequence() | {"memory": torch.randn(2, 6, 32)}


def picture() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 16, 16)}


def noisy_picture() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }


def prompted_picture() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3, 7]),
    }


FALLBACK = [
    Bare("timm vit", timm_vit, picture, 2),
    Bare("timm eva", timm_eva, picture, 2),
    Bare("nn.MultiheadAttention", SelfAttention, sequence, 1),
    Bare("nn.MultiheadAttention padded", SelfAttention, padded_sequence, 1, masked=True),
    Bare("nn.TransformerEncoder", Encoder, sequence, 2),
    Bare("nn.TransformerEncoder padded", Encoder, padded_sequence, 2, masked=True),
    Bare("nn.TransformerDecoder", Decoder, sequences, 4),
    Bare("diffusers DiT", diffusion_transformer, noisy_picture, 2),
    Bare("diffusers SD3", stable_diffusion_3, prompted_picture, 2),
]
