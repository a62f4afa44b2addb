"""With delay=1: exchanges that outlive their step, and what they have for the step after."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .compressors import Slot
from .engine import Ticket
from .memory import DELAYED, ErrorFeedback, key


class Running(NamedTuple):
    """The exchange of a gradient that the next step will apply."""

    ticket: Ticket
    like: Tensor  # the gradient, without its memory
    average: bool


class Late:
    """Of one step what is under way, and in `memory`, as any state that outlives a step, what the next one applies."""

    def __init__(self, memory: ErrorFeedback) -> None:
        self._memory = memory
        self.running: list[Running] = []
        self._totals: dict[str, Tensor] = {}  # what came of them, until the step is known to count
        self.finite = True  # what this step applies

    @property
    def held_bytes(self) -> int:
        """Of gradients, or of what has come of them."""
        results = (one.ticket.result for one in self.running)
        return sum((one.like if got is None else got.values).nbytes for one, got in zip(self.running, results))

    def add(self, ticket: Ticket, like: Tensor, *, average: bool) -> None:
        self.running.append(Running(ticket, torch.empty_like(like, device="meta"), average))

    def ended(self, name: str, total: Tensor) -> None:
        """The aggregated gradient of a parameter is there."""
        self._totals[key(name, DELAYED)] = total.reshape(-1)

    def keep(self, *, finite: bool) -> None:
        """The step counts. What is not finite is kept as it is: whoever looks for that is to see it."""
        self._memory.residuals.update(self._totals)
        self.finite = finite

    def forget(self) -> None:
        """What has come of the step is not to be applied."""
        self._totals.clear()

    def take(self, name: str) -> Tensor | None:
        """What there is to apply of this parameter, [numel], once."""
        return self._memory.residuals.pop(key(name, DELAYED), None)

    def take_of_others(self, slots: Iterable[Slot]) -> dict[int, Tensor]:
        """The same, by index, of those parameters that have no gradient under way."""
        present = {one.ticket.index for one in self.running}
        found = {slot.parameter.index: self.take(slot.name) for slot in slots if slot.parameter.index not in present}
        return {index: total for index, total in found.items() if total is not None}
