"""Which method is fastest on these ranks and this network: by trying, while training goes on."""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compressors import Compressor, OneOfCompressor, Slot
from ..engine import Engine, Ticket
from ..log import log as logger
from ..requests import Allreduce, Exchange, ReduceOp
from ..telemetry.export import append_lines
from ..transports.base import Transport
from .controller import Controller

_WARM_UP = 2  # steps after a change, which are not counted


class Trials(Controller):
    """Tries all candidates in turn, then goes on with the fastest; and again after `interval` steps.

    A step counts from its first gradient to that of the next, on the slowest rank, so that it has in it all that a
    method costs and hides. Of several steps the median counts. All ranks take the same decision, from the same numbers.

    steps: of each candidate in a round. rounds: of all candidates. margin: part of its time that a step must be faster
    than one without compression, or there is none.
    """

    def __init__(
        self,
        *,
        interval: int = 2000,
        steps: int = 8,
        rounds: int = 2,
        margin: float = 0.02,
        log: str | Path | None = None,
    ) -> None:
        for name, value, least in (("interval", interval, 1), ("steps", steps, _WARM_UP + 1), ("rounds", rounds, 1)):
            if value != int(value) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}: {value}")
        if not 0 <= margin < 1:
            raise ValueError(f"margin must be in [0, 1): {margin}")
        self.interval, self.steps, self.rounds, self.margin = interval, steps, rounds, margin
        self._log = log
        # As of every controller, for what does not change by layer.
        self.number, self.rates, self.accumulated, self.seconds, self.sent_bytes = 0, {}, {}, 0.0, 0
        self._alone = False  # a single rank
        self._best = 0  # the candidate that was fastest
        self._step = self._start = 0  # that is to come, or under way; and the first one of the trials
        self._last = -1  # the step whose first gradient came last,
        self._began = math.nan  # and when
        self._seconds: dict[int, list[float]] = {}  # of this trial's steps, by candidate
        self._ticket: Ticket | None = None
        self._decided: Tensor | None = None  # seconds of all candidates on the slowest rank

    def __reduce__(self) -> tuple[Any, ...]:
        options = {name: getattr(self, name) for name in ("interval", "steps", "rounds", "margin")}
        return functools.partial(type(self), log=self._log, **options), ()

    def bind(self, compressor: Compressor, slots: Sequence[Slot]) -> None:
        if not isinstance(compressor, OneOfCompressor):
            raise ValueError(f"{type(compressor).__name__} has nothing to try: it is one method")
        self.compressor, self.slots = compressor, slots

    def description(self) -> str:
        return f"trials of {self.steps} steps, {self.rounds} rounds, every {self.interval}, margin {self.margin}"

    def attach(self, transport: Transport) -> None:
        """On other ranks, or another network, what was found out says nothing."""
        self.drop()
        self._alone = transport.size == 1
        self._seconds.clear()
        self._last, self._start = -1, self._step
        self._choose()

    # Steps

    def submitting(self, engine: Engine, slot: Slot, gradient: Tensor) -> None:
        if slot.step.number == self._last:
            return
        now = time.perf_counter()
        if slot.step.number == self._last + 1 and self._last >= 0:
            self._note(self._last, now - self._began)
        self._began, self._last = now, slot.step.number
        if not self._alone and self._place(slot.step.number) == self._length:
            self._ticket = engine.submit(len(self.slots), self._decide())

    def finishing(self, engine: Engine) -> None:
        if self._ticket is not None and self._decided is None:
            self._decided = engine.finish(self._ticket)
            self.sent_bytes += self._ticket.sent_bytes

    def settled(self, step: int) -> None:
        decided, self._step = self._decided, step
        self.drop()
        if decided is not None:
            self._take(decided.tolist())
        self._choose()

    def drop(self) -> None:
        self._ticket = self._decided = None

    @property
    def _length(self) -> int:
        """Steps of a trial."""
        return self.rounds * self.steps * len(self.compressor.candidates)

    def _place(self, step: int) -> int:
        """Since the last trial began, or the first."""
        return (step - self._start) % (self._length + self.interval)

    def _candidate(self, step: int) -> int:
        if self._alone:
            return 0
        place = self._place(step)
        return place // self.steps % len(self.compressor.candidates) if place < self._length else self._best

    def _choose(self) -> None:
        candidate = self._candidate(self._step)
        if candidate != self.compressor.choice.index:
            self.compressor.choice.index = candidate
            for slot in self.slots:
                slot.cache = None

    def _note(self, step: int, seconds: float) -> None:
        place = self._place(step)
        if place < self._length and place % self.steps >= _WARM_UP:
            self._seconds.setdefault(self._candidate(step), []).append(seconds)

    # Decisions

    def _decide(self) -> Exchange:
        """Seconds of each candidate on the slowest rank, float64; infinite where a rank has none, as after a start."""
        count = len(self.compressor.candidates)
        mine = [statistics.median(self._seconds.get(candidate, [math.inf])) for candidate in range(count)]
        self._seconds.clear()
        return (yield Allreduce(torch.tensor(mine, dtype=torch.float64), ReduceOp.MAX, last=True))

    def _take(self, seconds: Sequence[float]) -> None:
        if not all(map(math.isfinite, seconds)):  # a trial that was interrupted
            return
        before, self.number = self._best, self.number + 1
        fastest = min(range(len(seconds)), key=seconds.__getitem__)
        self._best = fastest if seconds[fastest] <= (1 - self.margin) * seconds[0] else 0
        if self.slots[0].step.rank == 0:
            self._tell(seconds, first=self.number == 1, changed=self._best != before)

    def _tell(self, seconds: Sequence[float], *, first: bool, changed: bool) -> None:
        names = list(map(str, self.compressor.candidates))
        if first or changed:
            found = ", ".join(f"{name} {1000 * one:.1f} ms" for name, one in zip(names, seconds))
            why = f"{seconds[self._best] / seconds[0]:.2f} of the time" if self._best else "nothing is faster"
            logger.warning(
                "Compression.auto goes on with %s from step %d on, %s; a step took: %s",
                *(names[self._best], self._step, why, found),
            )
        if self._log is not None:
            line = {"number": self.number, "step": self._step, "chosen": names[self._best]}
            append_lines(Path(self._log), [json.dumps(line | {"seconds": dict(zip(names, seconds))})])

    # State

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "best": self._best, "step": self._step, "start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drop()
        self.number, self._best = state["number"], state["best"]
        self._step, self._start = state["step"], state["start"]
        self._last = -1
        self._choose()
