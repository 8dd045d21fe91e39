"""Opening a GGUF file as an ordinary model that can be saved, trained and converted."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from headwise.errors import HeadwiseError

DAMAGED = (ValueError, KeyError, OSError, RuntimeError, IndexError, TypeError, EOFError, AttributeError, struct.error)
"""What readers of binary files raise at a file that is cut short or garbled."""


def load_gguf(path: Path, dtype: torch.dtype | None = None, **kw: Any) -> tuple[Any, Any]:
    """The model (de-quantised, float32 unless asked otherwise) and its tokenizer."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise HeadwiseError(f"{path.name}: reading GGUF files needs the package gguf: pip install gguf.") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_header(path)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype or torch.float32, **kw
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except DAMAGED as error:
        raise HeadwiseError(
            f"{path} could not be read as a GGUF model ({reason(error)}): it is damaged or of a kind that transformers "
            "does not read; fetch it again, or give another file."
        ) from error
    # The loader leaves a note that the weights are quantised, which they no longer are and which forbids saving.
    for config in (model.config, getattr(model.config, "text_config", None)):
        if config is not None and hasattr(config, "quantization_config"):
            del config.quantization_config
    for note in ("hf_quantizer", "quantization_method", "is_quantized"):
        if note in vars(model):
            delattr(model, note)
    return model, tokenizer


def check_header(path: Path) -> None:
    """Refuse what is no GGUF file at all before anything large is read."""
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise HeadwiseError(f"{path} is not a GGUF file (it does not begin with 'GGUF'): fetch it again.")


def reason(error: Exception) -> str:
    """The first line of an error, short."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160].rstrip(". ")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from transformers inside."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
