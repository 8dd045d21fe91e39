"""What the decoding steps of all layers share on the devices."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Scratch:
    """Room between the launches of one step, and flags."""

    def __init__(self) -> None:
        self.flags: dict[torch.device, Tensor] = {}
        self._rooms: dict[tuple[torch.device, int], Tensor] = {}

    def flag(self, device: torch.device) -> Int[Tensor, " one"]:
        """Becomes 1 when a rule of Reweight gives a weight that is negative or not finite: nobody waits to see it."""
        if device not in self.flags:
            self.flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return self.flags[device]

    def flagged(self) -> bool:
        """Whether a flag was raised since this was asked last. Waits for the device."""
        raised = [flag for flag in self.flags.values() if flag.item()]
        for flag in raised:
            flag.zero_()
        return bool(raised)

    def room(self, device: torch.device, stream: int, size: int) -> Float[Tensor, " entry"]:
        """At least `size` numbers. What is launched on one stream runs in order, so all its steps may use them."""
        room = self._rooms.get((device, stream))
        if room is None or room.shape[0] < size:
            room = self._rooms[device, stream] = torch.empty(size, dtype=torch.float32, device=device)
        return room
