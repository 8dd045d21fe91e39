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
SPAN_OPTION = Annotated[
    str | None, typer.Option("--span", help=f'Words of the prompt, a segment called "{SPAN}" for methods.')
]
TOKENS = Annotated[int, typer.Option("--tokens", min=1, help="How many tokens to write.")]


def generate(
    model: Annotated[str, typer.Argument(help="zoo:llm, a hub id, a folder or a GGUF file.")],
    prompt: PROMPT,
    steer: Annotated[Path | None, typer.Option(help="A recipe that `headwise steer try --save` wrote.")] = None,
    span: SPAN_OPTION = None,
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
    print(prompt + written(opened, prompt, span, tokens, recipe.methods if recipe is not None else ()))


def written(opened: Opened, prompt: str, span: str | None, tokens: int, methods: Sequence[Method]) -> str:
    """What the model writes after the prompt, under the methods."""
    import headwise as hw

    if not opened.model.can_generate():
        raise HeadwiseError(f"{opened.name} writes no text: choose a language model.")
    batch = opened.encode(prompt)
    segments = None if span is None else spanned(opened, prompt, span)
    asked: dict[str, Any] = {**batch, "max_new_tokens": tokens, "do_sample": False}
    if methods:
        ready = [method.prepare(opened, batch) for method in methods]
        with hw.steer.apply(opened, *ready, segments=segments):
            found = opened.model.generate(**asked)
    else:
        found = opened.model.generate(**asked)
    return str(opened.decode(found[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def spanned(opened: Opened, prompt: str, span: str) -> Segments:
    """The prompt's tokens, those of the span named."""
    import headwise as hw

    start = prompt.find(span)
    if start < 0 or not span:
        raise HeadwiseError(f"--span {span!r} does not stand in the prompt: copy it from there.")
    return hw.Segments.from_characters(prompt, {SPAN: (start, start + len(span))}, opened.tokenizer)
