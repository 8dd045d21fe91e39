"""Random tokens to make prompts of: ordinary ones only, the same ones for the same seed."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models import Opened

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def ordinary(tokenizer: object, token: int) -> bool:
    """Whether a token is neither special nor a byte fallback nor a part of a character."""
    if token in tokenizer.all_special_ids:  # type: ignore[attr-defined]
        return False
    piece = tokenizer.convert_ids_to_tokens(token)  # type: ignore[attr-defined]
    text = tokenizer.decode([token])  # type: ignore[attr-defined]
    return piece is not None and not BYTE.fullmatch(piece) and "\ufffd" not in text and bool(text.strip())


def random_tokens(opened: Opened, rows: int, length: int, seed: int) -> Tensor:
    """`rows` sequences of `length` ordinary tokens, no token twice in a row, as [rows, length] on the CPU."""
    size = opened.model.get_input_embeddings().num_embeddings
    tokenizer = opened.tokenizer
    if tokenizer is not None:
        size = min(size, len(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(rows):
        order = torch.randperm(size, generator=generator).tolist()
        row = []
        for token in order:
            if tokenizer is None or ordinary(tokenizer, token):
                row.append(token)
            if len(row) == length:
                break
        if len(row) < length:
            raise HeadwiseError(
                f"The vocabulary has {len(row)} ordinary tokens; a prompt of {length} different ones is wanted."
            )
        found.append(row)
    return torch.tensor(found)


def beginning(opened: Opened) -> int | None:
    """The id of the beginning-of-sequence token, where the tokenizer has one."""
    return None if opened.tokenizer is None else opened.tokenizer.bos_token_id
