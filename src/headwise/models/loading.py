"""Loading transformers checkpoints: the right class, the right errors."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from headwise.errors import HeadwiseError
from headwise.models.anatomy import find_sites
from headwise.models.gguf import DAMAGED, quiet, reason

SHARED = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "subfolder")
"""Arguments that the tokenizer and processor need as well as the model."""


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from itself or its name."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise HeadwiseError(f"dtype: there is no {dtype!r} in torch; try 'float32', 'bfloat16' or 'float16'.")
    return found


def load_pretrained(
    where: str, dtype: torch.dtype | None, kw: dict[str, Any], processor: Any, tokenizer: Any, called: str = ""
) -> tuple[nn.Module, Any, Any]:
    """Model, tokenizer and processor from a folder or the hub, by the class its config names."""
    import transformers
    from safetensors import SafetensorError

    called = called or where
    shared = {key: kw[key] for key in SHARED if key in kw}
    local = Path(where).is_dir()
    if not local and not hub_reachable():  # asking a hub that is not there takes half a minute; its cache does not
        kw = {**kw, "local_files_only": True}
        shared["local_files_only"] = True
    try:
        config = transformers.AutoConfig.from_pretrained(where, **shared)
    except (OSError, ValueError) as error:
        raise HeadwiseError(cannot_open(called, local, error)) from error
    kind = model_class(config, kw)
    try:
        with quiet():
            options = {"config": config, **({"dtype": dtype} if dtype else {}), **kw, "output_loading_info": True}
            model, report = kind.from_pretrained(where, **options)
    except (*DAMAGED, SafetensorError) as error:
        raise HeadwiseError(
            f"{called}: its weights could not be loaded ({reason(error)}); the files are damaged, incomplete or of "
            "another model: fetch them again."
        ) from error
    missing = [key for key in report["missing_keys"] if any(key.startswith(s.name) for s in find_sites(model))]
    if missing:
        raise HeadwiseError(
            f"{called}: its checkpoint has no {min(missing)}, and random attention weights are of no use; the files "
            "are incomplete or of another model."
        )
    if processor is None:
        processor = load_processor(where, shared)
    if tokenizer is None:
        tokenizer = getattr(processor, "tokenizer", None) or load_tokenizer(where, shared)
    return model, tokenizer, processor


def model_class(config: Any, kw: dict[str, Any]) -> Any:
    """The class that `config.architectures` names; for code from the hub, the Auto class it registers."""
    import transformers

    names = config.architectures or []
    remote = getattr(config, "auto_map", None) or {}
    if kw.get("trust_remote_code") and remote:
        wanted = [key for key in remote if key.startswith("AutoModel")]
        for key in sorted(wanted, key=lambda key: remote[key].rpartition(".")[2] not in names):
            return getattr(transformers, key)
    for name in names:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type):
            return kind
    return transformers.AutoModel


def load_processor(where: str, shared: dict[str, Any]) -> Any:
    """The processor or image processor or feature extractor, if the checkpoint has one."""
    import transformers

    for auto in (transformers.AutoProcessor, transformers.AutoImageProcessor, transformers.AutoFeatureExtractor):
        try:
            found = auto.from_pretrained(where, **shared)
        except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError):
            continue
        # For a model of text alone, AutoProcessor returns the tokenizer.
        return None if isinstance(found, transformers.PreTrainedTokenizerBase) else found
    return None


def load_tokenizer(where: str, shared: dict[str, Any]) -> Any:
    """The tokenizer, if the checkpoint has one."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(where, **shared)
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError):
        return None


def cannot_open(called: str, local: bool, error: Exception) -> str:
    if local:
        return f"{called}: its config.json could not be read ({reason(error)}); check the folder."
    return (
        f"There is no model {called!r} to be had: it is not in the zoo (headwise models lists it), not a folder or "
        f"file here, and the hub {'did not give it' if hub_reachable() else 'cannot be reached'} ({reason(error)})."
    )


def move(model: nn.Module, device: str | torch.device | None, dtype: torch.dtype | None = None) -> nn.Module:
    """The model on another device, in another dtype."""
    try:
        return model.to(device=None if device is None else torch.device(device), dtype=dtype)
    except (RuntimeError, AssertionError) as error:
        raise HeadwiseError(f"device: the model cannot be put on {str(device)!r} ({reason(error)}).") from error


def hub_reachable() -> bool:
    """Whether the hub's name can be looked up; a proxy would look it up for us."""
    from huggingface_hub import constants

    if any(key.lower() in ("https_proxy", "http_proxy", "all_proxy") for key in os.environ):
        return True
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def check_weights(model: nn.Module, name: str) -> None:
    """Refuse weights that are not numbers: every statistic would be NaN without a word."""
    for key, value in model.named_parameters():
        if not value.is_floating_point() or value.device.type == "meta" or value.numel() == 0:
            continue
        # A sum is cheap and keeps any NaN; only a suspicious one is looked at closely.
        total = value.detach().sum(dtype=torch.float32 if value.dtype != torch.float64 else None)
        if torch.isnan(total) and torch.isnan(value.detach()).any():
            raise HeadwiseError(f"{name}: the weights {key} contain NaN; the checkpoint is broken, fetch it again.")
