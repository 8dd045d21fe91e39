"""The control of many studies: the same architecture with the weights it starts from."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from headwise.models import Opened, open_model
from headwise.study.train import build


def untrained(opened: Opened, seed: int = 0) -> Opened:
    """A model of the same class and config with fresh weights; tokenizer and processor are shared."""
    config = deepcopy(opened.model.config)
    model = build(lambda: type(opened.model)(config), seed).eval().to(opened.device)
    fresh = open_model(model, tokenizer=opened.tokenizer, processor=opened.processor)
    return replace(fresh, name=f"{opened.name}, untrained")
