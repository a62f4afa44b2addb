"""Rates that change during training, at the same step on all ranks: who gives them, and from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..compressors import Compressor, Slot
from ..engine import Engine
from ..requests import Total
from ..transports.base import Transport
from . import journal
from .layers import check_adaptable
from .policies import Policy


class Controller:
    """Decides how gradients travel. A session calls it as a step goes by; what it does then is up to subclasses."""

    def __init__(self) -> None:
        self.number = 0  # of the decision in force; 0 before the first one
        self.rates: dict[str, float] = {}  # of the plan in force, by parameter
        # Without the loss scale: by parameter, float32 [numel] of this rank; and those of the kind AGGREGATE.
        self.accumulated: dict[str, Tensor] = {}
        self.seconds = 0.0  # that this rank has spent on decisions
        self.sent_bytes = 0

    def bind(self, compressor: Compressor, slots: Sequence[Slot]) -> None:
        """Learn what is to be compressed; raises ValueError for what leaves nothing to decide."""
        self.compressor: Any = compressor
        self.slots = slots

    def description(self) -> str:
        """Equal on ranks whose controllers are made alike."""
        raise NotImplementedError

    def attach(self, transport: Transport) -> None:
        """Start on these ranks; all of them call it."""
        self.drop()

    def submitting(self, engine: Engine, slot: Slot, gradient: Tensor) -> None:
        """Before the exchange of a gradient starts."""

    def finishing(self, engine: Engine) -> None:
        """Before the first result of a step is asked for."""

    def received(self, slot: Slot, total: Total) -> None:
        """The aggregated gradient of a parameter, as the optimizer gets it, the same on every rank; not called where a
        rank's gradient was not finite."""

    def rates_in_force(self) -> dict[str, float]:
        """By parameter, of those that have one."""
        return {}

    def record_loss(self, loss: float) -> None:
        """This rank's, of a step."""

    def settled(self, step: int) -> None:
        """A step has ended, and `step` begins."""

    def drop(self) -> None:
        """Forget what is under way in this step."""

    def most_held(self) -> int:
        """Bytes of `accumulated` at most."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks; JSON-serializable."""
        return {"number": self.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drop()
        self.number = state["number"]

    def load_accumulated(self, accumulated: Mapping[str, Tensor]) -> None:
        self.accumulated = {name: total.detach().clone() for name, total in accumulated.items()}


class RateController(Controller):
    """Gives every slot its rate."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def bind(self, compressor: Compressor, slots: Sequence[Slot]) -> None:
        super().bind(check_adaptable(compressor), slots)

    def attach(self, transport: Transport) -> None:
        super().attach(transport)
        self._give()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rates": dict(self.rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.rates = dict(state["rates"])
        self._give()

    def rates_in_force(self) -> dict[str, float]:
        return {slot.name: rate for slot in self.slots if (rate := self._rate(slot)) is not None}

    def _rate(self, slot: Slot) -> float | None:
        return self.rates.get(slot.name, self._initial(slot))

    def _initial(self, slot: Slot) -> float | None:
        has_choice = slot.parameter.compressed and self.compressor.candidates(slot.parameter.shape)
        return self.policy.initial_rate if has_choice else None

    def _give(self) -> None:
        for slot in self.slots:
            rate = self._rate(slot)
            if rate != slot.rate:
                slot.rate, slot.cache = rate, None


class Replay(RateController):
    """Repeats the plans of a log that every rank can read; before the first one, rates are those of `policy`."""

    def __init__(self, path: str | Path, policy: Policy) -> None:
        super().__init__(policy)
        self._path = Path(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._path, self.policy)

    def bind(self, compressor: Compressor, slots: Sequence[Slot]) -> None:
        super().bind(compressor, slots)
        self._plans = journal.read(self._path, [slot.name for slot in slots])

    def description(self) -> str:
        return f"{self.policy!r}, replay of {sorted(self._plans.items())}"

    def settled(self, step: int) -> None:
        if step in self._plans:
            self.number += 1
            self.rates = self._plans[step]
            self._give()
