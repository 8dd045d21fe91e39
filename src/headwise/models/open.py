"""Opening a model: from the zoo, the hub, a folder, a GGUF file, or one you already hold."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.models import inputs, loading, zoo
from headwise.models.anatomy import Site, find_sites
from headwise.models.gguf import load_gguf
from headwise.models.segments import Segments


@dataclass
class Opened:
    """A model with what belongs to it: how its inputs are made, and where its attention layers are."""

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    processor: Any = field(repr=False)
    sites: list[Site] = field(repr=False)
    name: str

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def streams(self) -> list[str]:
        """The model's streams, in the order of its layers."""
        return list(dict.fromkeys(site.stream for site in self.sites))

    @property
    def max_positions(self) -> int | None:
        """How many text tokens the model can place; None if there is no such limit."""
        return inputs.max_positions(self.model)

    @property
    def fingerprint(self) -> str:
        """A short checksum of the config and of some of the weights: another model has another one."""
        return fingerprint(self.model)

    def encode(self, given: Any, **kw: Any) -> dict[str, Tensor]:
        """Model inputs from text(s), chat messages, picture(s), sound, or token ids, on the model's device."""
        return inputs.encode(self, given, **kw)

    def segments(self, batch: dict[str, Tensor], **kw: Any) -> Segments:
        """The best names for this input's tokens that can be had without being told more."""
        return inputs.default_segments(self, batch, **kw)

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str]:
        """Token ids back to text: a string for one sequence, a list for a batch."""
        tokenizer = inputs.need_tokenizer(self)
        ids = torch.as_tensor(ids)
        if ids.dim() == 2:
            return tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def open_model(
    source: str | Path | nn.Module,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    **kw: Any,
) -> Opened:
    """Open `source`: "zoo:llm", a hub id, a folder, a `.gguf` file, or a module you hold already.

    A model loaded here is in eval mode and on `device` (the GPU if there is one); a module you pass stays in its mode,
    and moves only if you name a device or dtype. Further arguments go to `from_pretrained`; code from the hub is run
    only if you pass `trust_remote_code=True`.
    """
    if isinstance(source, nn.Module):
        if kw:
            raise HeadwiseError(f"open_model: {', '.join(kw)} only apply to a model that is still to be loaded.")
        model = source
        if device is not None or dtype is not None:
            model = loading.move(model, device, loading.as_dtype(dtype))
        name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    elif isinstance(source, str | Path):
        model, found_tokenizer, found_processor, name = load(source, loading.as_dtype(dtype), kw, processor, tokenizer)
        tokenizer, processor = tokenizer or found_tokenizer, processor or found_processor
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if "device_map" not in kw:
            model = loading.move(model, device)
        model.eval()
    else:
        raise HeadwiseError(f"source: wanted a name, a path or an nn.Module, got {type(source).__name__}.")
    loading.check_weights(model, name)
    sites = find_sites(model)
    if not sites:
        raise HeadwiseError(
            f"{name} ({type(model).__name__}) has no attention layers that headwise can find, so there are no heads "
            "to look at; choose a model with attention."
        )
    if processor is not None and tokenizer is None:
        tokenizer = getattr(processor, "tokenizer", None)
    return Opened(model, tokenizer, processor, sites, name)


def load(
    source: str | Path, dtype: torch.dtype | None, kw: dict[str, Any], processor: Any, tokenizer: Any
) -> tuple[nn.Module, Any, Any, str]:
    """Model, tokenizer, processor and name of something that is not in memory yet."""
    text = str(source)
    if text.startswith("zoo:"):
        folder = zoo.pull(text)[0]
        return *loading.load_pretrained(str(folder), dtype, kw, processor, tokenizer, called=text), text
    path = Path(text).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise HeadwiseError(f"{text}: there is no such GGUF file.")
        model, found = load_gguf(path, dtype, **kw)
        return model, found, None, path.stem
    if path.is_file():
        raise HeadwiseError(
            f"{text} is a single {path.suffix or 'file'}: wanted a .gguf file or a folder with config.json and weights."
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise HeadwiseError(f"{text} has no config.json: wanted a folder that save_pretrained wrote.")
        if (path / SWAPPED).is_file():
            raise HeadwiseError(
                f"{text} holds a converted model (it has a {SWAPPED}): load it with headwise.swap.load, and open what "
                "that gives."
            )
        return *loading.load_pretrained(str(path), dtype, kw, processor, tokenizer), path.resolve().name
    if path.is_absolute() or text.startswith((".", "~")):
        raise HeadwiseError(f"{text}: there is no such folder or file.")
    return *loading.load_pretrained(text, dtype, kw, processor, tokenizer), text


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        facts = {key: value for key, value in config.to_dict().items() if key not in UNSTABLE}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    parameters = list(model.named_parameters())
    for name, value in parameters[:: max(1, len(parameters) // 16)]:
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if value.device.type != "meta":
            some = value.detach().flatten()[:256].float().cpu()
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:12]


SWAPPED = "headwise_swap.json"
"""Beside a model's config: which of its layers were replaced by mechanisms of the swap room, which lies above this."""

UNSTABLE = ("_name_or_path", "transformers_version", "_attn_implementation", "dtype", "torch_dtype", "use_cache")
"""Config entries that say how a model was opened, not which it is."""
