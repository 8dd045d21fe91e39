"""Examples a method is calibrated on: a prompt, the answers it may have, and (if known) which is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models import Opened


@dataclass(frozen=True)
class Choice:
    """`options` are continued text, with their leading space. `gold` is the number of the right one."""

    prompt: str
    options: tuple[str, ...]
    gold: int | None = None

    def __post_init__(self) -> None:
        if len(self.options) < 2 or len(set(self.options)) != len(self.options):
            raise HeadwiseError(f"Choice(options=...) must be two or more different answers; got {self.options!r}.")
        if self.gold is not None and not 0 <= self.gold < len(self.options):
            raise HeadwiseError(f"Choice(gold=...) must be 0 to {len(self.options) - 1}; got {self.gold!r}.")


def option_logprobs(opened: Opened, choice: Choice) -> Float[Tensor, " option"]:
    """Log-probability of each option's tokens after the prompt (their sum), of the model as it is now, steered or not.

    Options of one token share a forward pass."""
    with torch.no_grad():
        ids = opened.encode(choice.prompt)["input_ids"]
        start = ids.shape[1]
        texts = [opened.encode(choice.prompt + option)["input_ids"] for option in choice.options]
        if all(text.shape[1] == start + 1 and torch.equal(text[:, :start], ids) for text in texts):
            last = opened.model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
            return last[torch.stack([text[0, -1] for text in texts])]
        found = []
        for text in texts:
            # An option may change how the prompt's last token is cut: what is shared is the context.
            shared = int((text[0, :start] == ids[0, : text.shape[1]]).long().cumprod(0).sum())
            logits = opened.model(input_ids=text).logits[0, shared - 1 : -1].float().log_softmax(-1)
            found.append(logits.gather(-1, text[0, shared:, None]).sum())
        return torch.stack(found)


def accuracy(opened: Opened, examples: Sequence[Choice]) -> float:
    """Share of the examples whose most probable option is the right one."""
    if not examples or any(example.gold is None for example in examples):
        raise HeadwiseError("examples: wanted one or more Choices whose gold is known.")
    return sum(int(option_logprobs(opened, e).argmax()) == e.gold for e in examples) / len(examples)


def option_entropy(opened: Opened, examples: Sequence[Choice]) -> float:
    """Mean entropy (nats) of the options' probabilities, renormalised over the options; needs no gold."""
    if not examples:
        raise HeadwiseError("examples: wanted one or more Choices.")
    total = 0.0
    for example in examples:
        p = option_logprobs(opened, example).softmax(-1)
        total += float(-torch.special.xlogy(p, p).sum())
    return total / len(examples)
