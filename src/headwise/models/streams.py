"""Which stream an attention layer belongs to, judged by the model's own names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

WORDS = (
    ("pooling", re.compile(r"attn_?pool|attention_?pool")),
    ("qformer", re.compile(r"q_?former")),
    ("connector", re.compile(r"connector|projector|resampler|perceiver|abstractor|merger")),
    ("audio", re.compile(r"audio|speech|acoustic|wav2vec|whisper")),
    ("vision", re.compile(r"vision|visual|image_encoder|image_tower|video|(^|_)vi[td](_|$)|^vpm$|^img_|pixel")),
    ("text", re.compile(r"language|(^|_)text|^llm?$|^lm_|thinker|talker")),
)
CROSS = re.compile(
    r"cross_?att|^enc_?dec|encdec|encoder_?att|enc_attn|^multihead_attn$|crossattention|^xattn|_to_image|_to_token"
)
MODALITY = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_features": "audio",
    "input_values": "audio",
}


def guess_stream(model: nn.Module, name: str, kind: str = "self") -> str:
    """The stream of the module at dotted `name` in `model`: "text", "vision", "audio", "cross", ..."""
    if kind == "cross":
        return "cross"
    config = getattr(model, "config", None)
    if is_diffusion(model):
        return "image"
    if name.endswith("head.attention"):  # siglip's learned query that sums a picture up
        return "pooling"
    parts = [part.lower() for part in name.split(".") if not part.isdigit()]
    for part in parts:
        for stream, words in WORDS:
            # a text model's wrapper such as "bert.encoder" says nothing; a tower's name does
            if words.search(part) and not (stream == "text" and part == "text_decoder"):
                return stream
    base = base_stream(model)
    if not getattr(config, "is_encoder_decoder", isinstance(model, nn.Transformer)):
        return base
    if any(part in ("decoder", "text_decoder") or part.endswith("_decoder") for part in parts):
        if base == "text":
            return "decoder"
        return "text" if writes_text(config) else "decoder"
    if "encoder" in parts or any(part.endswith("_encoder") for part in parts):
        return "encoder" if base == "text" else base
    return base


def attention_kind(module: nn.Module, name: str = "") -> str:
    """ "cross" where the keys come from elsewhere, by the module's flags or its name; else "self"."""
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool):
        return "cross" if flag else "self"
    last = [part.lower() for part in name.split(".") if not part.isdigit()][-2:]
    class_name = type(module).__name__.lower()
    if "crossatt" in class_name and "self" not in class_name:
        return "cross"
    return "cross" if any(CROSS.search(part) for part in last) else "self"


def base_stream(model: nn.Module) -> str:
    """What the model as a whole reads."""
    if hasattr(model, "main_input_name"):
        names = (model.main_input_name, getattr(getattr(model, "encoder", None), "main_input_name", None))
        return next((MODALITY[str(name)] for name in names if str(name) in MODALITY), "text")
    if type(model).__module__.split(".")[0] == "timm":
        return "vision"
    kinds = {type(module) for module in model.modules()}
    return "vision" if nn.Conv2d in kinds and nn.Embedding not in kinds else "text"


def is_diffusion(model: nn.Module) -> bool:
    return any(base.__module__.split(".")[0] == "diffusers" for base in type(model).__mro__)


def writes_text(config: Any) -> bool:
    """Whether the decoder of an encoder-decoder has a vocabulary (whisper, trocr) or queries (detr)."""
    for holder in (config, getattr(config, "decoder", None), getattr(config, "text_config", None)):
        if isinstance(getattr(holder, "vocab_size", None), int):
            return True
    return False
