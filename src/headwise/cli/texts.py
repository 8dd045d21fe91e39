"""The texts a command is given, or the one headwise ships, as inputs of a model."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.errors import HeadwiseError

if TYPE_CHECKING:
    from headwise.models import Opened


def read_texts(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Name and contents of every file, before anything slow is begun."""
    for path in paths:
        try:
            words = path.read_text(encoding="utf-8")
        except OSError as error:
            raise HeadwiseError(f"--text {path}: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise HeadwiseError(f"--text {path} is not UTF-8 text: convert it first.") from None
        if not words.strip():
            raise HeadwiseError(f"--text {path} is empty: give a file with at least one word.")
        yield str(path), words


def inputs_of(opened: Opened, texts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Model inputs of every text; without texts those of the novel's chapters."""
    return [encode(opened, name, words) for name, words in texts] or default_inputs(opened)


def encode(opened: Opened, name: str, words: str) -> dict[str, Any]:
    """Model inputs, or an error that names the file."""
    try:
        return opened.encode(words)
    except HeadwiseError as error:
        raise HeadwiseError(f"--text {name}: {error}") from None


def default_inputs(opened: Opened) -> list[dict[str, Any]]:
    """The text headwise ships, a chapter an input, each cut to what the model can place."""
    if opened.tokenizer is None or getattr(opened.model, "main_input_name", "input_ids") != "input_ids":
        raise HeadwiseError(
            f"{opened.name} does not read text: from Python, headwise.scan.heads(opened, inputs=[opened.encode(...)]) "
            "scans it on pictures or sound."
        )
    limit = {} if opened.max_positions is None else {"truncation": True, "max_length": opened.max_positions}
    return [opened.encode(chapter, **limit) for chapter in chapters()]


def chapters() -> list[str]:
    """The text headwise ships: three chapters of a novel."""
    prose = files("headwise.scan").joinpath("assets/prose.txt").read_text(encoding="utf-8")
    return [chapter.strip() for chapter in prose.split("Chapter ") if chapter.strip()]
