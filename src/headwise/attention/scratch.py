"""What the decoding steps of all layers share on the devices."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Scratch:
    """Room between the launches of one step, and flags."""

    def __init__(self) -> None:
        self.flags: dict[torch.device, Tensor] = {}
        self._rooms: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

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

    def room(
        self, device: torch.device, stream: int, size: int, lanes: int
    ) -> tuple[Float[Tensor, " entry"], Int[Tensor, " lane"]]:
        """At least `size` numbers, and `lanes` counters that are 0 between launches.

        What is launched on one stream runs in order, so all its steps may use them.
        """
        found = self._rooms.get((device, stream))
        if found is None or found[0].shape[0] < size or found[1].shape[0] < lanes:
            if found is not None:
                size, lanes = max(size, found[0].shape[0]), max(lanes, found[1].shape[0])
            room = torch.empty(size, dtype=torch.float32, device=device)
            found = self._rooms[device, stream] = room, torch.zeros(lanes, dtype=torch.int32, device=device)
        return found
