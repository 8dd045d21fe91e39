"""What mechanisms keep of the tokens they have seen, so that the next token costs one row."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headwise.errors import HeadwiseError


class Entries:
    """Of one module: tensors by name, batch first. Those of `extend` grow along their token axis (the last but one);
    those of `put` are states that are replaced."""

    def __init__(self) -> None:
        self.grown: dict[str, Tensor] = {}
        self._rooms: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.length = 0

    def extend(self, **new: Tensor) -> tuple[Tensor, ...]:
        """The new tokens' tensors appended to the old ones, all of them returned in the order given."""
        for name, tensor in new.items():
            old = self.grown.get(name)
            self.grown[name] = tensor if old is None else self._joined(name, old, tensor)
        return tuple(self.grown[name] for name in new)

    def _joined(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        """The new tokens behind the old ones, in a tensor with room for more: copying all that is kept for every token
        would cost more than attending to it."""
        if torch.is_grad_enabled():  # what a backward pass may read again must not be written to
            return torch.cat([old, new], -2)
        start, stop = old.shape[-2], old.shape[-2] + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or not fits(room, old, stop):
            room = old.new_empty(*old.shape[:-2], stop + stop // 8 + 16, old.shape[-1])
            room[..., :start, :] = old
            self._rooms[name] = room
        room[..., start:stop, :] = new
        return room[..., :stop, :]

    def put(self, **state: Tensor) -> None:
        self.states.update(state)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor by `change(tensor)`."""
        for kept in (self.grown, self.states):
            kept.update({name: change(tensor) for name, tensor in kept.items()})


def fits(room: Tensor, old: Tensor, stop: int) -> bool:
    """Whether the room begins with the old tokens, may be written to, and is large enough."""
    same = room.data_ptr() == old.data_ptr() and room.stride() == old.stride() and room.shape[:-2] == old.shape[:-2]
    return same and room.shape[-2] >= stop and room.is_inference() == torch.is_inference_mode_enabled()


class Cache:
    """One for a model: `y = mechanism(x_new, cache=cache)` continues where the last call stopped."""

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[nn.Module, Entries] = WeakKeyDictionary()

    def of(self, module: nn.Module) -> Entries:
        """What one module keeps."""
        if module not in self._entries:
            self._entries[module] = Entries()
        return self._entries[module]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """`change` on everything that is kept: beams, batches, devices."""
        for entries in self._entries.values():
            entries.map(change)

    def reorder(self, rows: Int[Tensor, " row"]) -> None:
        """Keeps these rows of the batch, in this order (beam search)."""
        self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def crop(self, length: int) -> None:
        """Forgets all tokens from `length` on. Modules that keep a running state can't."""
        for module, entries in self._entries.items():
            if entries.states and length < entries.length:
                raise HeadwiseError(f"crop: {type(module).__name__} keeps a running state, which can't be turned back.")
            entries.grown = {name: tensor[..., :length, :] for name, tensor in entries.grown.items()}
            entries.length = min(entries.length, length)
