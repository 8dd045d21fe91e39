"""From text, pictures, sound or ids to model inputs, and the default names for their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models.gguf import reason
from headwise.models.segments import Segments
from headwise.models.tokens import used

if TYPE_CHECKING:
    from headwise.models.open import Opened

POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx")
WHISPER_RATE = 16_000


def encode(opened: Opened, given: Any, *, target: str | None = None, **kw: Any) -> dict[str, Tensor]:
    """Model inputs for whatever `given` is. `target` is what an encoder-decoder is to have written so far.

    Text is a string or a list of strings; a list of {"role", "content"} is a conversation; pictures are PIL images or
    arrays [height, width, 3]; sound is a one-dimensional array of samples; whole-number tensors are token ids.
    Pictures or sound beside a text are given as `images=` or `audio=`.
    """
    kind = kind_of(given)
    if kind == "text" and not any(key in kw for key in ("images", "audio", "videos")):
        batch = encode_text(opened, given, **kw)
    elif kind == "chat" and any(not isinstance(message["content"], str) for message in given):
        batch = encode_mixed_chat(opened, given, **kw)
    elif kind == "chat":
        tokenizer = need_tokenizer(opened)
        batch, _ = Segments.from_chat(tokenizer, given, **{"add_generation_prompt": True, **kw})
        check_length(opened, batch["input_ids"])
    elif kind == "ids":
        ids = torch.as_tensor(given)
        batch = {"input_ids": ids if ids.dim() == 2 else ids[None]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        check_length(opened, batch["input_ids"])
    elif kind == "inputs":
        batch = {key: torch.as_tensor(value) for key, value in given.items()}
    else:
        batch = encode_media(opened, given, kind, **kw)
    batch = with_decoder(opened, batch, target)
    return {key: on_device(opened, value) for key, value in batch.items()}


def kind_of(given: Any) -> str:
    """text, chat, ids, image, audio or inputs."""
    if isinstance(given, str):
        return "text"
    if isinstance(given, Mapping) or (hasattr(given, "data") and hasattr(given, "convert_to_tensors")):
        return "inputs"
    if hasattr(given, "size") and hasattr(given, "convert"):
        return "image"
    if isinstance(given, Tensor | np.ndarray):
        floating = given.is_floating_point() if isinstance(given, Tensor) else given.dtype.kind == "f"
        if given.ndim in (3, 4) or (given.ndim == 2 and given.dtype in (np.uint8, torch.uint8)):
            return "image"
        if given.ndim == 1 and floating:
            return "audio"
        if given.ndim in (1, 2) and not floating:
            return "ids"
        if given.ndim == 2:
            raise HeadwiseError(
                f"encode: an array of shape {tuple(given.shape)} is neither sound [samples], a picture "
                "[height, width, 3] nor token ids."
            )
    if isinstance(given, Sequence) and len(given):
        first = given[0]
        if isinstance(first, Mapping) and "role" in first:
            return "chat"
        return "ids" if isinstance(first, int) else kind_of(first)
    if isinstance(given, Sequence):
        raise HeadwiseError("encode: the list is empty; give at least one text, picture or sound.")
    raise HeadwiseError(f"encode: cannot make model inputs from {type(given).__name__}.")


def encode_text(opened: Opened, given: str | Sequence[str], **kw: Any) -> dict[str, Tensor]:
    texts = [given] if isinstance(given, str) else list(given)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise HeadwiseError(f"encode: text {place} is {type(text).__name__}, wanted a string.")
        if not text.strip():
            where = "the text" if len(texts) == 1 else f"text {place}"
            raise HeadwiseError(f"encode: {where} is empty; give at least one word.")
    tokenizer = need_tokenizer(opened)
    options: dict[str, Any] = {"return_tensors": "pt", "return_token_type_ids": None, "verbose": False, **kw}
    if len(texts) > 1:
        options.setdefault("padding", True)
        if tokenizer.pad_token_id is None:
            raise HeadwiseError(
                "encode: texts of different lengths need a padding token and this tokenizer has none; set "
                "opened.tokenizer.pad_token (often to its eos_token)."
            )
    if writes_text(opened.model):
        options.setdefault("padding_side", "left")
    batch = dict(tokenizer(texts, **options))
    if batch["input_ids"].shape[1] == 0:
        raise HeadwiseError("encode: the tokenizer makes no tokens of this text; give at least one word it knows.")
    check_length(opened, batch["input_ids"], None if len(texts) == 1 else batch.get("attention_mask"))
    return batch


def encode_media(opened: Opened, given: Any, kind: str, **kw: Any) -> dict[str, Tensor]:
    processor = opened.processor
    if processor is None:
        raise HeadwiseError(
            f"encode: {opened.name} has no processor for {kind} input; open it with open_model(..., processor=...)."
        )
    if kind == "audio":
        extractor = getattr(processor, "feature_extractor", processor)
        rate = kw.pop("sampling_rate", WHISPER_RATE)
        sounds = [to_numpy(given)] if getattr(given, "ndim", 0) == 1 else [to_numpy(one) for one in given]
        check_sounds(opened, extractor, sounds)
        made = call(extractor, sounds, sampling_rate=rate, **kw)
    elif kind == "image":
        made = call(processor, images=as_pictures(given), **kw)
    else:
        made = call(processor, text=given, **kw)
        check_length(opened, made["input_ids"])
    return made


def encode_mixed_chat(opened: Opened, messages: Any, **kw: Any) -> dict[str, Tensor]:
    """A conversation with pictures or sound in it, by the processor's own template."""
    template = getattr(opened.processor, "apply_chat_template", None)
    if template is None:
        raise HeadwiseError(f"encode: {opened.name} has no processor for a conversation that is not all text.")
    made = call(template, messages, **{"tokenize": True, "return_dict": True, "add_generation_prompt": True, **kw})
    check_length(opened, made["input_ids"])
    return made


def call(processor: Any, *args: Any, **kw: Any) -> dict[str, Tensor]:
    """The tensors a processor makes; its complaints as ours."""
    try:
        batch = processor(*args, return_tensors="pt", **kw)
    except (ValueError, TypeError) as error:
        raise HeadwiseError(f"encode: the model's processor refuses this input ({reason(error)}).") from error
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


def check_sounds(opened: Opened, extractor: Any, sounds: Sequence[np.ndarray]) -> None:
    """Refuse silence of no length, and what the extractor would cut off without a word."""
    most = getattr(extractor, "n_samples", None)
    for sound in sounds:
        if sound.size == 0:
            raise HeadwiseError("encode: the sound is empty; give at least one sample.")
        if isinstance(most, int) and sound.size > most:
            raise HeadwiseError(
                f"encode: the sound has {sound.size} samples, but {opened.name} hears {most} at a time; cut it."
            )


def as_pictures(given: Any) -> Any:
    """Grey pictures [height, width] get three equal channels."""
    if isinstance(given, Sequence):
        return [as_pictures(one) for one in given]
    if isinstance(given, np.ndarray | Tensor) and given.ndim == 2:
        return np.stack([to_numpy(given)] * 3, axis=-1)
    return given


def with_decoder(opened: Opened, batch: dict[str, Tensor], target: str | None) -> dict[str, Tensor]:
    """Add what an encoder-decoder's decoder has written so far: its start token, then `target`."""
    config = getattr(opened.model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in batch:
        if target is not None:
            raise HeadwiseError(f"encode: target only means something for an encoder-decoder, not for {opened.name}.")
        return batch
    generation = getattr(opened.model, "generation_config", None)
    start = getattr(generation, "decoder_start_token_id", None)
    start = start if start is not None else getattr(config, "decoder_start_token_id", None)
    if start is None:
        return batch
    ids = [start]
    if "input_features" in batch and getattr(generation, "no_timestamps_token_id", None) is not None:
        ids.append(generation.no_timestamps_token_id)  # type: ignore[union-attr]
    if target is not None:
        ids += need_tokenizer(opened)(target, add_special_tokens=False)["input_ids"]
    rows = next(iter(batch.values())).shape[0]
    return {**batch, "decoder_input_ids": torch.tensor([ids] * rows)}


def check_length(opened: Opened, ids: Tensor, mask: Tensor | None = None) -> None:
    """Refuse more tokens than the model has positions for."""
    length, most = ids.shape[1], opened.max_positions
    if most is None or length <= most:
        return
    raise HeadwiseError(
        f"encode: the text has {length} tokens, but {opened.name} has {most} positions; give a shorter text, or cut "
        f"it with encode(..., truncation=True, max_length={most})."
    )


def max_positions(model: nn.Module) -> int | None:
    """How many tokens the text side can place, as its config says; learned tables may keep some for themselves."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = next((n for key in POSITIONS if isinstance(n := getattr(text, key, None), int) and n > 0), None)
    for name, module in model.named_modules():
        # RoBERTa and its kin start counting after the padding index.
        table = most and isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if table and module.padding_idx is not None and module.num_embeddings == most:
            return most - module.padding_idx - 1
    return most


def default_segments(opened: Opened, batch: Mapping[str, Any], stream: str | None = None) -> Segments:
    """Image places and special tokens where there are ids; class, register and patch tokens for pictures.

    Where two sides have tokens, `stream` says which is meant: "vision" the picture's, "decoder" what was written.
    """
    ids = None
    if stream not in ("vision", "audio"):
        order = ("decoder_input_ids", "input_ids") if stream == "decoder" else ("input_ids", "decoder_input_ids")
        ids = next((batch[key] for key in order if key in batch), None)
    if ids is None:
        return media_segments(opened, batch)
    if opened.tokenizer is None:
        return Segments.positions(ids.shape[-1])
    processor = opened.processor
    if processor is not None and "pixel_values" in batch and "input_ids" in batch:
        segments = Segments.from_processor(processor, batch)
    else:
        segments = Segments.from_special(opened.tokenizer, ids, rest="text")
    return mark_padding(segments, batch.get("attention_mask") if ids is batch.get("input_ids") else None)


def mark_padding(segments: Segments, mask: Tensor | None) -> Segments:
    """Padding is what the mask hides, whichever token fills it: many tokenizers pad with their end token."""
    if mask is None or mask.shape != segments.labels.shape or bool(mask.all()):
        return segments
    names = segments.names if "pad" in segments.names else (*segments.names, "pad")
    labels = segments.labels.clone()
    labels[(mask == 0).to(labels.device)] = names.index("pad")
    return used(Segments, names, labels)


def media_segments(opened: Opened, batch: Mapping[str, Any]) -> Segments:
    pixels = batch.get("pixel_values")
    config = getattr(opened.model, "config", None)
    config = getattr(config, "vision_config", config)
    patch = getattr(config, "patch_size", None)
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and isinstance(patch, int):
        patches = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
        registers = getattr(config, "num_register_tokens", 0) or 0
        spans = {"cls": (0, 1), "register": (1, 1 + registers)} if registers else {"cls": (0, 1)}
        return Segments.from_spans(spans, 1 + registers + patches, rest="patch")
    raise HeadwiseError(
        f"segments: no default names for the tokens of {opened.name} with inputs {', '.join(batch)}; build Segments "
        "by Segments.from_spans or Segments.positions."
    )


def writes_text(model: nn.Module) -> bool:
    """A decoder-only language model, whose padding belongs on the left."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate and can_generate()) or bool(getattr(config, "is_decoder", False))


def need_tokenizer(opened: Opened) -> Any:
    if opened.tokenizer is None:
        raise HeadwiseError(f"{opened.name} has no tokenizer; open it with open_model(..., tokenizer=...).")
    return opened.tokenizer


def to_numpy(sound: Any) -> np.ndarray:
    return sound.detach().cpu().numpy() if isinstance(sound, Tensor) else np.asarray(sound)


def on_device(opened: Opened, value: Tensor) -> Tensor:
    """On the model's device; pictures and sound in its dtype."""
    if value.is_floating_point():
        dtype = next((p.dtype for p in opened.model.parameters() if p.is_floating_point()), value.dtype)
        return value.to(opened.device, dtype)
    return value.to(opened.device)
