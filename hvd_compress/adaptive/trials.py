"""Which method is fastest on these ranks and this network: by trying, while training goes on."""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Timetable:
    """Which steps try what: `rounds` of `steps` with each candidate, and again `interval` steps later."""

    interval: int = 2000
    steps: int = 8
    rounds: int = 2

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("steps", _WARM_UP + 1), ("rounds", 1)):
            value = getattr(self, name)
            if value != int(value) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}: {value}")

    def length(self, candidates: int) -> int:
        """Steps of a trial."""
        return self.rounds * self.steps * candidates

    def place(self, step: int, candidates: int) -> int:
        """Where in a trial, or after it, a step is; `step` counts from the first one of all trials."""
        return step % (self.length(candidates) + self.interval)

    def tried(self, step: int, candidates: int) -> int | None:
        """The candidate that a step tries; None between trials."""
        place = self.place(step, candidates)
        return place // self.steps % candidates if place < self.length(candidates) else None

    def counts(self, step: int, candidates: int) -> bool:
        """Whether it is none of those just after a change."""
        return self.place(step, candidates) % self.steps >= _WARM_UP


class Stopwatch:
    """Times steps, from the first gradient of each to that of the next."""

    def __init__(self) -> None:
        self.last = -1  # the step whose first gradient came last,
        self.began = math.nan  # and when
        self.seconds: dict[int, list[float]] = {}  # by candidate

    def begin(self, step: int) -> float | None:
        """The first gradient of `step` is there. Returns seconds of the step before it, if that was timed."""
        now = time.perf_counter()
        took = now - self.began if step == self.last + 1 and self.last >= 0 else None
        self.began, self.last = now, step
        return took

    def medians(self, candidates: int) -> list[float]:
        """Of each candidate; infinite where there is none. Starts anew."""
        found = [statistics.median(self.seconds.get(candidate, [math.inf])) for candidate in range(candidates)]
        self.seconds.clear()
        return found


class Trials(Controller):
    """Tries all candidates in turn, then goes on with the fastest; and again after a while.

    A step counts from its first gradient to that of the next, on the slowest rank, so that it has in it all that a
    method costs and hides. Of several steps the median counts. All ranks take the same decision, from the same numbers.

    margin: part of its time that a step must be faster than one without compression, or there is none.
    """

    def __init__(
        self, timetable: Timetable = Timetable(), *, margin: float = 0.02, log: str | Path | None = None
    ) -> None:
        super().__init__()
        if not 0 <= margin < 1:
            raise ValueError(f"margin must be in [0, 1): {margin}")
        self.timetable, self.margin, self._log = timetable, margin, log
        self.watch = Stopwatch()
        self._alone = False  # a single rank
        self._best = 0  # the candidate that was fastest
        self._step = self._start = 0  # that is to come, or under way; and the first one of the trials
        self._ticket: Ticket | None = None
        self._decided: Tensor | None = None  # seconds of all candidates on the slowest rank

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), self.timetable, margin=self.margin, log=self._log), ()

    def bind(self, compressor: Compressor, slots: Sequence[Slot]) -> None:
        if not isinstance(compressor, OneOfCompressor):
            raise ValueError(f"{type(compressor).__name__} has nothing to try: it is one method")
        super().bind(compressor, slots)

    def description(self) -> str:
        return f"{self.timetable}, margin {self.margin}"

    def attach(self, transport: Transport) -> None:
        """On other ranks, or another network, what was found out says nothing."""
        super().attach(transport)
        self._alone = transport.size == 1
        self.watch, self._start = Stopwatch(), self._step
        self._choose()

    # Steps

    def submitting(self, engine: Engine, slot: Slot, gradient: Tensor) -> None:
        step = slot.step.number
        if self._alone or step == self.watch.last:
            return
        if (took := self.watch.begin(step)) is not None:
            self._note(step - 1, took)
        since, count = step - self._start, len(self.compressor.candidates)
        if self.timetable.place(since, count) == self.timetable.length(count):
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

    def _tried(self, step: int) -> int | None:
        return self.timetable.tried(step - self._start, len(self.compressor.candidates))

    def _choose(self) -> None:
        tried = self._tried(self._step)
        candidate = 0 if self._alone else self._best if tried is None else tried
        if candidate != self.compressor.choice.index:
            self.compressor.choice.index = candidate
            for slot in self.slots:
                slot.cache = None

    def _note(self, step: int, seconds: float) -> None:
        tried = self._tried(step)
        if tried is not None and self.timetable.counts(step - self._start, len(self.compressor.candidates)):
            self.watch.seconds.setdefault(tried, []).append(seconds)

    # Decisions

    def _decide(self) -> Exchange:
        """Seconds of each candidate on the slowest rank, float64; infinite where a rank has none, as after a start."""
        mine = self.watch.medians(len(self.compressor.candidates))
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
        return super().state_dict() | {"best": self._best, "step": self._step, "start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._best, self._step, self._start = state["best"], state["step"], state["start"]
        self.watch.last = -1
        self._choose()
