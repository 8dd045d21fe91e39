"""Segments from what a tokenizer or processor knows: character offsets, chat roles, special tokens, image places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models.segments import Segments, Spans, as_list

ROLES = ("bos", "eos", "cls", "sep", "pad", "mask", "unk")


def offsets(text: str, encoding: Any) -> tuple[Any, list[tuple[int, int]]]:
    """The encoding of `text` and the characters each token stands for."""
    if callable(encoding):
        if not getattr(encoding, "is_fast", False):
            raise HeadwiseError(
                f"tokenizer: {type(encoding).__name__} does not say which characters a token stands for; give a fast "
                "tokenizer, or token spans to Segments.from_spans."
            )
        encoding = encoding(text, return_offsets_mapping=True)
    found = encoding.get("offset_mapping")
    if found is None and getattr(encoding, "encodings", None):
        found = encoding.encodings[0].offsets
    if found is None:
        raise HeadwiseError("encoding: it carries no offsets; give the tokenizer itself, or ask it for offsets.")
    found = found.tolist() if isinstance(found, Tensor) else list(found)
    if found and isinstance(found[0], list) and found[0] and isinstance(found[0][0], list | tuple):
        found = found[0]
    return encoding, [(int(a), int(b)) for a, b in found]


def by_characters(cls: type[Segments], text: str, spans: Spans, encoding: Any, rest: str) -> Segments:
    _, places = offsets(text, encoding)
    names = [*spans, *([] if rest in spans else [rest])]
    flat = []
    for number, (name, given) in enumerate(spans.items()):
        for start, end in as_list(given):
            if not 0 <= start <= end <= len(text):
                raise HeadwiseError(f"{name}: the span ({start}, {end}) does not fit in {len(text)} characters.")
            flat.append((start, end, number))
    other = names.index(rest)
    labels = torch.full((len(places),), other)
    flat.sort()
    for token, (a, b) in enumerate(places):
        best = 0
        for start, end, number in flat:
            if start >= b:
                break
            overlap = min(b, end) - max(a, start)
            if overlap > best:
                best, labels[token] = overlap, number
    return used(cls, names, labels, keep=tuple(spans))


def used(cls: type[Segments], names: Sequence[str], labels: Tensor, keep: tuple[str, ...] = ()) -> Segments:
    """Segments of the names that occur (and those in `keep`), renumbered."""
    there = set(labels.unique().tolist())
    chosen = [i for i, name in enumerate(names) if i in there or name in keep]
    table = torch.zeros(len(names), dtype=torch.long)
    table[chosen] = torch.arange(len(chosen))
    return cls(tuple(names[i] for i in chosen), table[labels])


def from_chat(
    cls: type[Segments], tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **kw: Any
) -> tuple[dict[str, Tensor], Segments]:
    if not messages:
        raise HeadwiseError("messages: an empty conversation; give at least one {'role': ..., 'content': ...}.")
    if not getattr(tokenizer, "chat_template", None):
        raise HeadwiseError(
            f"tokenizer: {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} has no chat template; "
            "use Segments.from_characters on the prompt you write yourself."
        )
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **kw
    )
    spans: dict[str, list[tuple[int, int]]] = {}
    place = 0
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text") for part in content]
        for part in parts:
            part = (part or "").strip()
            if not part:
                continue
            start = text.find(part, place)
            if start < 0:
                raise HeadwiseError(
                    f"messages: the chat template rewrites what {message['role']!r} said ({part[:40]!r}), so its "
                    "tokens cannot be told apart; use Segments.from_characters on the rendered text."
                )
            place = start + len(part)
            spans.setdefault(str(message["role"]), []).append((start, place))
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    segments = by_characters(cls, text, spans, encoding, "template")
    return tensors(encoding), segments


def from_documents(
    cls: type[Segments],
    tokenizer: Any,
    docs: Sequence[str] | Mapping[str, str],
    before: str,
    after: str,
    separator: str,
) -> tuple[dict[str, Tensor], Segments]:
    named = dict(docs) if isinstance(docs, Mapping) else {f"document {i}": doc for i, doc in enumerate(docs, 1)}
    if not named or not any(doc.strip() for doc in named.values()):
        raise HeadwiseError("docs: no text in any document; give at least one that is not empty.")
    pieces = {"before": before, **named, "after": after}
    text, spans = "", {}
    for name, piece in pieces.items():
        if not piece:
            continue
        text += separator if text else ""
        spans[name] = (len(text), len(text) + len(piece))
        text += piece
    encoding, _ = offsets(text, tokenizer)
    return tensors(encoding), by_characters(cls, text, spans, encoding, "rest")


def tensors(encoding: Any) -> dict[str, Tensor]:
    """A batch of one, without the offsets."""
    return {key: torch.tensor([value]) for key, value in encoding.items() if key != "offset_mapping"}


def special_roles(tokenizer: Any) -> dict[int, str]:
    """Token id -> the name of its role; special tokens without a role keep their own text."""
    roles: dict[int, str] = {}
    for role in ROLES:
        number = getattr(tokenizer, f"{role}_token_id", None)
        if isinstance(number, int):
            roles.setdefault(number, role)
    for number in getattr(tokenizer, "all_special_ids", ()):
        roles.setdefault(int(number), str(tokenizer.convert_ids_to_tokens(int(number))))
    return roles


def by_special(cls: type[Segments], tokenizer: Any, ids: Any, rest: str) -> Segments:
    return by_ids(cls, torch.as_tensor(ids), special_roles(tokenizer), rest)


def by_processor(cls: type[Segments], processor: Any, inputs: Mapping[str, Any], rest: str) -> Segments:
    tokenizer = getattr(processor, "tokenizer", processor)
    roles = special_roles(tokenizer)
    found = False
    for kind in ("image", "video", "audio"):
        number = getattr(processor, f"{kind}_token_id", None)
        token = getattr(processor, f"{kind}_token", None)
        if number is None and token is not None:
            number = tokenizer.convert_tokens_to_ids(str(token))
        if isinstance(number, int):
            roles[number], found = kind, True
    if not found:
        raise HeadwiseError(
            f"processor: {type(processor).__name__} names no image, video or audio token; use Segments.from_special."
        )
    return by_ids(cls, torch.as_tensor(inputs["input_ids"]), roles, rest)


def by_ids(cls: type[Segments], ids: Tensor, roles: Mapping[int, str], rest: str) -> Segments:
    names = [rest]
    labels = torch.zeros(ids.shape, dtype=torch.long)
    for number in ids.unique().tolist():
        role = roles.get(int(number))
        if role is not None:
            if role not in names:
                names.append(role)
            labels[(ids == number).cpu()] = names.index(role)
    return used(cls, names, labels)
