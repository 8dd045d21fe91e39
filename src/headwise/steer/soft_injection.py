"""Soft injection of task embeddings: what a few-shot prompt does to the heads, given to a zero-shot prompt.

`t[l, h]` is a head's mean output at the last token of many few-shot prompts of a task. On a zero-shot prompt, at its
last token only, `z' = (1 - alpha) z + alpha t`, with `alpha[l, h] = sigmoid(x[l, h])` learnt by gradient descent on the
first token of the answer while the model stays as it is. alpha also says which heads carry the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attention import Blend, Edit, HeadOutput, attend
from headwise.errors import HeadwiseError
from headwise.models import Opened
from headwise.paper import Paper
from headwise.steer.method import Method, check_per_head
from headwise.steer.prompts import LAST, mark_last

CHECKS = 8
"""How often the held-out examples are looked at on the way: every 50 of the paper's 400 steps."""


@dataclass(frozen=True, eq=False)
class SoftInjection(Method):
    """`embedding` [layer, head, dim] and `alpha` [layer, head], from `calibrate` (or `task_embedding` and an alpha of
    your own). The prompt's last token must be called "last": `segments=steer.mark_last(batch)`. Tokens generated after
    it are not changed; they see what it wrote."""

    embedding: Float[Tensor, "layer head dim"] | None = None
    alpha: Float[Tensor, "layer head"] | None = None
    what: ClassVar[str] = "what few-shot prompts do to the heads, without the shots"
    paper: ClassVar[Paper] = Paper(
        "Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning", "2507.20906"
    )

    def edits(self, opened: Opened) -> list[Edit]:
        if self.embedding is None or self.alpha is None:
            raise HeadwiseError("SoftInjection wants embedding= and alpha=: call calibrate(opened, ...).")
        if not self.alpha.requires_grad and not self.alpha.any():
            return []
        check_per_head("SoftInjection(embedding=...)", self.embedding, opened)
        check_per_head("SoftInjection(alpha=...)", self.alpha, opened)
        if self.alpha.min() < 0 or self.alpha.max() > 1:
            raise HeadwiseError(
                f"SoftInjection(alpha=...) must be from 0 to 1; got {float(self.alpha.min())} to "
                f"{float(self.alpha.max())}."
            )
        return [
            Blend(alpha, target=target, layer=layer, tokens=LAST)
            for layer, (alpha, target) in enumerate(zip(self.alpha, self.embedding, strict=True))
        ]

    def calibrate(
        self,
        opened: Opened,
        shots: Sequence[str],
        train: Sequence[tuple[str, str]],
        valid: Sequence[tuple[str, str]],
        steps: int = 400,
        lr: float = 0.2,
        batch: int = 1,
        seed: int = 0,
    ) -> Self:
        """A copy with the embedding of the few-shot prompts `shots` and alpha learnt on `train`: (zero-shot prompt,
        answer) pairs, `batch` of them a step. Kept is the alpha of the lowest loss on `valid`, looked at eight times on
        the way, at the start and at the end."""
        if not shots or not train or not valid or steps < 1 or batch < 1:
            raise HeadwiseError("calibrate wants shots, train and valid examples, and steps= and batch= of at least 1.")
        embedding = task_embedding(opened, shots)
        x = torch.zeros(embedding.shape[:2], device=opened.device, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=lr)
        order = torch.randint(len(train), (steps, batch), generator=torch.Generator().manual_seed(seed)).tolist()
        best, lowest = x.detach().sigmoid(), float("inf")
        with frozen(opened.model):
            for step in range(steps + 1):
                if step % max(1, steps // CHECKS) == 0 or step == steps:
                    now = self.with_(embedding, x.detach().sigmoid())
                    with torch.no_grad():
                        loss = float(now.loss(opened, valid))
                    best, lowest = (now.alpha, loss) if loss < lowest else (best, lowest)
                if step < steps:
                    with torch.enable_grad():
                        now = self.with_(embedding, x.sigmoid())
                        now.loss(opened, [train[n] for n in order[step]]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return self.with_(embedding.cpu(), best.cpu())

    def with_(self, embedding: Tensor, alpha: Tensor) -> Self:
        return replace(self, embedding=embedding, alpha=alpha)

    def loss(self, opened: Opened, pairs: Sequence[tuple[str, str]]) -> Float[Tensor, ""]:
        """Mean cross-entropy (nats) of the answers' first tokens after the steered prompts."""
        logits = self.logits(opened, [prompt for prompt, _ in pairs])
        wanted = torch.tensor([first_token(opened, *pair) for pair in pairs], device=logits.device)
        return nn.functional.cross_entropy(logits, wanted)

    def logits(self, opened: Opened, prompts: Sequence[str]) -> Float[Tensor, "prompt vocabulary"]:
        """What the steered model expects next after every prompt; all of them in one pass, padded on the right."""
        batch = opened.encode(list(prompts), padding_side="right")
        with attend(opened, edits=self.edits(opened), segments=mark_last(batch)):
            logits = opened.model(**batch).logits
        last = batch["attention_mask"].sum(-1) - 1
        return logits[torch.arange(len(last), device=last.device), last].float()


def first_token(opened: Opened, prompt: str, answer: str) -> int:
    """The first token of the answer as it goes on from the prompt."""
    start = opened.encode(prompt)["input_ids"].shape[1]
    whole = opened.encode(prompt + answer)["input_ids"][0]
    if len(whole) <= start:
        raise HeadwiseError(f"answer: {answer!r} adds no token to the prompt.")
    return int(whole[start])


def task_embedding(opened: Opened, prompts: Sequence[str]) -> Float[Tensor, "layer head dim"]:
    """The heads' mean outputs at the last token of these prompts."""
    if not len(prompts) or isinstance(prompts, str):
        raise HeadwiseError(f"prompts: wanted a list of one or more texts; got {prompts!r}.")
    reading = HeadOutput(what="vector", per="head", queries=[-1], stream="text")
    with attend(opened, readings=[reading]) as run, torch.no_grad():
        for prompt in prompts:
            opened.model(**opened.encode(prompt))
    found = run.tree["text"]["head_output"].transpose("layer", "head", "channel").values
    return torch.tensor(found, dtype=torch.float32, device=opened.device)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model gathers gradients inside."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
