"""The tasks of lm-eval (EleutherAI's harness), answered by a steered model.

lm_eval.evaluate(opened, ["arc_easy"], [steer.TokenScale(gain=1.5)], limit=100)["results"]
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from headwise.errors import HeadwiseError
from headwise.extras import need
from headwise.models import Opened
from headwise.steer import Method, apply


def evaluate(
    opened: Opened, tasks: Sequence[Any], methods: Sequence[Method] = (), batch_size: int = 1, **options: Any
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns for these tasks (names, or tasks of your own), with the methods applied to
    every forward pass. `options` go to it: `num_fewshot=`, `limit=`, `task_manager=`, ...

    lm-eval writes the prompts, so that no segments can be named but "first", the token at place 0; with a batch of
    more than one prompt, padding may stand there when text is generated, which such methods refuse. Needs the extra
    `lm-eval`."""
    if not tasks:
        raise HeadwiseError("tasks: wanted names of lm-eval's tasks, such as arc_easy; got none.")
    harness = need("lm_eval", "lm-eval")
    wrapper = need("lm_eval.models.huggingface", "lm-eval").HFLM
    model = wrapper(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)
    with apply(opened, *methods) if methods else nullcontext():
        return harness.simple_evaluate(model=model, tasks=list(tasks), **options)
