"""The object that a compression counts in, and its user reads."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import export
from .records import Collective, ParameterStep, StepSeconds, Traffic
from .spans import Spans

_COLLECTIVES = 1000


@dataclass
class Telemetry:
    """Counts since the start, or since `reset`; of this rank only. `watch` has it record more."""

    steps: int = 0
    compressed: Traffic = field(default_factory=Traffic)  # the tensors that are compressed
    total: Traffic = field(default_factory=Traffic)  # all tensors
    agreement_bytes: int = 0  # by which ranks agree on what decides a step; not part of the above
    parameters: dict[str, Traffic] = field(default_factory=dict)
    collectives: deque[Collective] = field(default_factory=lambda: deque(maxlen=_COLLECTIVES))  # the last ones
    spans: Spans | None = None  # where the time went, once that is watched
    history: deque[ParameterStep | StepSeconds] = field(default_factory=lambda: deque(maxlen=0))
    errors: bool = False  # whether records have them

    def watch(self, *, records: int = 0, errors: bool = False) -> None:
        """From now on measure where the time goes, and keep the last `records` records: of parameters in a step.

        errors: also find out what of each gradient was not sent, by exchanging it with nobody once more: about twice
            the time of encoding it.
        """
        if records < 0:
            raise ValueError(f"records must not be negative: {records}")
        if errors and not records:
            raise ValueError("errors are a part of records: say how many to keep, such as records=100_000")
        self.spans = Spans()
        self._before = dict(self.spans.seconds)
        self.history = deque(self.history, maxlen=records)
        self.errors = errors

    @property
    def recording(self) -> bool:
        """Whether records are kept."""
        return self.history.maxlen != 0

    def record(
        self,
        name: str,
        raw_bytes: int,
        sent_bytes: int,
        *,
        compressed: bool,
        step: int = 0,
        rate: float | None = None,
        error: float | None = None,
    ) -> None:
        """Count one parameter's gradient in one step."""
        self.parameters.setdefault(name, Traffic()).add(raw_bytes, sent_bytes)
        self.total.add(raw_bytes, sent_bytes)
        if compressed:
            self.compressed.add(raw_bytes, sent_bytes)
        if self.recording:
            self.history.append(ParameterStep(step, name, raw_bytes, sent_bytes, rate, error))

    def settled(self, step: int) -> None:
        """Record where the time of `step` went, which is over."""
        if self.spans is not None and self.recording:
            now = dict(self.spans.seconds)
            self.history.append(StepSeconds(step, **{kind: now[kind] - self._before[kind] for kind in now}))
            self._before = now

    def reset(self) -> None:
        """Forget all that was counted and recorded; go on recording what is watched."""
        watched, records, errors = self.spans is not None, self.history.maxlen or 0, self.errors
        self.__init__()  # type: ignore[misc]
        if watched:
            self.watch(records=records, errors=errors)

    def table(self) -> str:
        """Bytes, rates, errors and seconds a step as text."""
        return export.table(self)

    def to_jsonl(self, path: str | Path, *, append: bool = False) -> None:
        """Write the records as JSON, one a line; `history.clear()` afterwards has the next call write later ones."""
        export.to_jsonl(self.history, path, append=append)

    def to_tensorboard(self, writer: Any) -> None:
        """Write the records to a SummaryWriter, or for TensorBoard into a directory; as of `to_jsonl`.

        Raises ImportError without the package tensorboard.
        """
        export.to_tensorboard(self.history, writer)
