"""What a model must have for a question to fit, in words that can stand in an error."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from headwise.models import Opened


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward names this argument."""
    return argument in inspect.signature(model.forward).parameters


def quiet(model: nn.Module) -> dict[str, Any]:
    """Arguments that spare work a scan never looks at: the logits of all but the last token, and the cache."""
    spared = {"logits_to_keep": 1, "use_cache": False}
    return {name: value for name, value in spared.items() if accepts(model, name)}


def lacks_language_model(opened: Opened) -> str | None:
    """A decoder that reads token ids, sees only earlier tokens and predicts the next one."""
    model = opened.model
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", lambda: False)()
    embeds = getattr(model, "get_output_embeddings", lambda: None)() is not None
    crossed = bool(getattr(config, "is_encoder_decoder", False))
    text = any(site.stream == "text" for site in opened.sites)
    if accepts(model, "input_ids") and generates and embeds and text and not crossed:
        return None
    return "a decoder-only language model (token ids in, next-token logits out)"


def lacks_token_order(opened: Opened) -> str | None:
    """A stream of self-attention whose tokens stand in one line (text or sound, not the patches of a picture)."""
    return None if ordered_streams(opened) else "a stream of text or sound: patches of a picture stand in no one line"


def ordered_streams(opened: Opened) -> list[str]:
    """Streams where "the token before" means something: self-attention outside of pictures."""
    streams = dict.fromkeys(s.stream for s in opened.sites if s.kind == "self")
    return [s for s in streams if s not in ("vision", "image")]
