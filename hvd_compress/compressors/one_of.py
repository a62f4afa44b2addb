"""One of several algorithms at a time, for all parameters: which one may change from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..requests import Exchange
from .base import Compressor
from .slot import Slot


class Choice:
    """Which of the candidates goes, from the next gradient on: the same on every rank."""

    def __init__(self) -> None:
        self.index = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Every copy has its own."""
        return type(self), ()


@dataclass(frozen=True)
class OneOfCompressor(Compressor):
    """Sends gradients by the candidate that `choice` names; the first one sends them as they are.

    What a candidate owes in its residual stays there while it is not chosen.
    """

    candidates: tuple[Compressor, ...]
    choice: Choice = field(default_factory=Choice, compare=False, repr=False)

    algorithm = 0  # it sends no frames of its own
    label: ClassVar[str] = "auto"

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return any(candidate.stateful for candidate in self.candidates)

    @property
    def slow_with_adam(self) -> bool:  # type: ignore[override]
        return any(candidate.slow_with_adam for candidate in self.candidates)

    @property
    def now(self) -> Compressor:
        return self.candidates[self.choice.index]

    def chosen(self, slot: Slot) -> Compressor | None:
        return self.now.chosen(slot)

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        return self.now.exchange(slot, gradient)

    def rate_of(self, slot: Slot) -> float | None:
        return self.now.rate_of(slot)

    def owed(self, slot: Slot, gradient: Tensor) -> Tensor:
        return self.now.owed(slot, gradient)

    def held(self, slot: Slot) -> dict[str, int]:
        """The most that any candidate holds, by what."""
        parts: dict[str, int] = {}
        for candidate in self.candidates:
            for what, size in candidate.held(slot).items():
                parts[what] = max(parts.get(what, 0), size)
        return parts

    def cached(self, slot: Slot) -> Sequence[Tensor]:
        return self.now.cached(slot)

    def options(self) -> dict[str, Any]:
        return {"candidates": self.candidates}
