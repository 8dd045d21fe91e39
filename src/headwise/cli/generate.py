"""`headwise generate`: text from a model, steered by a recipe or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.cli.console import err, hush
from headwise.errors import HeadwiseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headwise.models import Opened, Segments
    from headwise.steer import Method

SPAN = "emphasis"
"""The name that the words of --span get."""
PROMPT = Annotated[str, typer.Option(help="The text to go on from.")]
SPANS = Annotated[
    list[str] | None,
    typer.Option(
        "--span",
        help=f'Words of the prompt, a segment called "{SPAN}" for methods, or NAME=WORDS. May be given several times.',
    ),
]
TOKENS = Annotated[int, typer.Option("--tokens", min=1, help="How many tokens to write.")]


def generate(
    model: Annotated[str, typer.Argument(help="zoo:llm, a hub id, a folder or a GGUF file.")],
    prompt: PROMPT,
    steer: Annotated[Path | None, typer.Option(help="A recipe that `headwise steer try --save` wrote.")] = None,
    spans: SPANS = None,
    tokens: TOKENS = 48,
) -> None:
    """Go on from a prompt, word by word the most probable, and print what comes."""
    hush()
    import headwise as hw

    recipe = None if steer is None else hw.steer.Recipe.load(steer)
    with err.status(f"opening {model}"):
        opened = hw.open_model(model)
    if recipe is not None:
        recipe.check(opened)
    text = written(opened, prompt, spans or (), tokens, recipe.methods if recipe is not None else ())
    print(text if crossed(opened) else prompt + text)


def written(opened: Opened, prompt: str, spans: Sequence[str], tokens: int, methods: Sequence[Method]) -> str:
    """What the model writes after the prompt (an encoder-decoder: about it), under the methods."""
    import headwise as hw
    from headwise.steer.prompts import LAST, speak_of

    model = opened.model
    if not model.can_generate() or model.main_input_name != "input_ids":
        raise HeadwiseError(f"{opened.name} writes no text from text: choose a language model.")
    batch = opened.encode(prompt)
    segments = spanned(opened, prompt, spans) if spans else None
    asked: dict[str, Any] = {**batch, "max_new_tokens": tokens, "do_sample": False}
    if methods:
        ready = [method.prepare(opened, batch) for method in methods]
        fitting = [method for method in ready if method.lacks(opened) is None]  # `apply` says what the others lack
        if speak_of([edit for method in fitting for edit in method.edits(opened)], LAST):
            segments = hw.steer.mark_last(batch, segments)
        with hw.steer.apply(opened, *ready, segments=segments):
            found = model.generate(**asked)[0]
    else:
        found = model.generate(**asked)[0]
    # Both ends decoded, as some tokenizers drop the space in front of a text.
    before = found[:0] if crossed(opened) else found[: batch["input_ids"].shape[1]]
    whole, start = (str(opened.decode(ids, skip_special_tokens=True)) for ids in (found, before))
    return whole[len(start) :]


def crossed(opened: Opened) -> bool:
    """Whether the model is an encoder-decoder, which begins a text of its own."""
    return bool(getattr(opened.model.config, "is_encoder_decoder", False))


def spanned(opened: Opened, prompt: str, spans: Sequence[str]) -> Segments:
    """The prompt's tokens, those of the spans named."""
    import headwise as hw

    found: dict[str, list[tuple[int, int]]] = {}
    for given in spans:
        name, words = (SPAN, given) if given in prompt else given.split("=", 1) if "=" in given else (SPAN, given)
        start = prompt.find(words)
        if start < 0 or not words or not name:
            raise HeadwiseError(f"--span {given!r} does not stand in the prompt: copy it from there.")
        found.setdefault(name, []).append((start, start + len(words)))
    return hw.Segments.from_characters(prompt, found, opened.tokenizer)
