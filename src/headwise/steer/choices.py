"""Examples a method is calibrated on: a prompt, the answers it may have, and (if known) which is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headwise.errors import HeadwiseError
from headwise.models import Opened


@dataclass(frozen=True)
class Choice:
    """`options` are continued text, with their leading space. `gold` is the number of the right one."""

    prompt: str
    options: tuple[str, ...]
    gold: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.options, str) or len(self.options) < 2 or len(set(self.options)) != len(self.options):
            raise HeadwiseError(f"Choice(options=...) must be two or more different answers; got {self.options!r}.")
        if self.gold is not None and not 0 <= self.gold < len(self.options):
            raise HeadwiseError(f"Choice(gold=...) must be 0 to {len(self.options) - 1}; got {self.gold!r}.")


def check_writes(opened: Opened) -> None:
    """Raises unless the model says, of a text, which token comes next."""
    model = opened.model
    writes = getattr(model, "can_generate", lambda: True)() and opened.tokenizer is not None
    crossed = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not writes or crossed or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise HeadwiseError(f"{opened.name} does not go on from a text: choose a decoder-only language model.")


def shared_tokens(prompt: Int[Tensor, " token"], text: Int[Tensor, " token"], answer: str) -> int:
    """How many tokens a prompt and the text of prompt and answer have in common: an answer may change how the prompt's
    last token is cut."""
    shared = int((text[: len(prompt)] == prompt[: len(text)]).long().cumprod(0).sum())
    if not shared:
        raise HeadwiseError(f"prompt: the answer {answer!r} changes its first token; begin with a longer prompt.")
    if shared == len(text):
        raise HeadwiseError(f"answer: {answer!r} adds no token to the prompt.")
    return shared


ROWS = 16
"""Prompts that share a forward pass."""


def option_logprobs(opened: Opened, choice: Choice) -> Float[Tensor, " option"]:
    """Log-probability of each option's tokens after the prompt (their sum), of the model as it is now, steered or not.

    Options of one token share a forward pass."""
    with torch.no_grad():
        return scored(opened, choice)


def scored(opened: Opened, choice: Choice) -> Float[Tensor, " option"]:
    """`option_logprobs`, with gradients where they are on."""
    check_writes(opened)
    prompt = opened.encode(choice.prompt)["input_ids"]
    single = single_tokens(opened, choice, prompt[0])
    if single is not None:
        return opened.model(input_ids=prompt).logits[0, -1].float().log_softmax(-1)[single]
    found = []
    for option in choice.options:
        text = opened.encode(choice.prompt + option)["input_ids"]
        shared = shared_tokens(prompt[0], text[0], option)
        logits = opened.model(input_ids=text).logits[0, shared - 1 : -1].float().log_softmax(-1)
        found.append(logits.gather(-1, text[0, shared:, None]).sum())
    return torch.stack(found)


def single_tokens(opened: Opened, choice: Choice, prompt: Int[Tensor, " token"]) -> Int[Tensor, " option"] | None:
    """The options as one token each behind the unchanged prompt, or None where one of them is more than that."""
    texts = [opened.encode(choice.prompt + option)["input_ids"][0] for option in choice.options]
    start = len(prompt)
    if all(len(text) == start + 1 and torch.equal(text[:start], prompt) for text in texts):
        return torch.stack([text[-1] for text in texts])
    return None


@torch.no_grad()
def many_logprobs(opened: Opened, choices: Sequence[Choice]) -> list[Float[Tensor, " option"]]:
    """`option_logprobs` of every choice. Prompts whose options are single tokens share passes, those of like length
    together; what pads them stands on the right, where no token of theirs looks."""
    check_writes(opened)
    prompts = [opened.encode(choice.prompt)["input_ids"][0] for choice in choices]
    options = [single_tokens(opened, choice, ids) for choice, ids in zip(choices, prompts, strict=True)]
    found: dict[int, Tensor] = {n: option_logprobs(opened, choices[n]) for n, o in enumerate(options) if o is None}
    shared = sorted((n for n, o in enumerate(options) if o is not None), key=lambda n: len(prompts[n]))
    for rows in (shared[at : at + ROWS] for at in range(0, len(shared), ROWS)):
        lengths = torch.tensor([len(prompts[n]) for n in rows], device=opened.device)
        ids = pad_sequence([prompts[n] for n in rows], batch_first=True)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        logits = opened.model(input_ids=ids, attention_mask=mask).logits
        last = logits[torch.arange(len(rows), device=ids.device), lengths - 1].float().log_softmax(-1)
        found |= {n: row[options[n]] for n, row in zip(rows, last, strict=True)}
    return [found[n] for n in range(len(choices))]


def accuracy(opened: Opened, examples: Sequence[Choice]) -> float:
    """Share of the examples whose most probable option is the right one."""
    if not examples or any(example.gold is None for example in examples):
        raise HeadwiseError("examples: wanted one or more Choices whose gold is known.")
    found = many_logprobs(opened, examples)
    return sum(int(p.argmax()) == e.gold for p, e in zip(found, examples, strict=True)) / len(examples)


def likelihood(opened: Opened, examples: Sequence[Choice]) -> float:
    """Mean log-probability (nats) of the right option among the options."""
    if not examples or any(example.gold is None for example in examples):
        raise HeadwiseError("examples: wanted one or more Choices whose gold is known.")
    found = many_logprobs(opened, examples)
    return sum(float(p.log_softmax(-1)[e.gold]) for p, e in zip(found, examples, strict=True)) / len(examples)


def option_entropy(opened: Opened, examples: Sequence[Choice]) -> float:
    """Mean entropy (nats) of the options' probabilities, renormalised over the options; needs no gold."""
    if not examples:
        raise HeadwiseError("examples: wanted one or more Choices.")
    found = [p.softmax(-1) for p in many_logprobs(opened, examples)]
    return sum(float(-torch.special.xlogy(p, p).sum()) for p in found) / len(examples)
