"""The object that a compression counts in, and its user reads."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from . import export
from .log_file import LogFile
from .records import Collective, ParameterStep, StepSeconds, Traffic
from .spans import Spans
from .trace import Trace

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
    file: LogFile | None = None  # where records go
    trace: Trace | None = None  # where what happens goes

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
        self.spans.listener = self.trace.span if self.trace is not None else None
        self.history = deque(self.history, maxlen=records)
        self.errors = errors

    def watch_time(self) -> None:
        """From now on measure where the time goes, if it is not measured yet."""
        if self.spans is None:
            self.watch()

    def write_to(self, path: str | Path) -> None:
        """From now on append all records, as of `to_jsonl`, to a file: some thousands at a time, the rest at exit.

        What `watch` keeps is kept besides. A file that cannot be written is told once, and then left alone.
        """
        self.watch_time()
        self.file = LogFile(path)

    def trace_to(self, path: str | Path, *, rank: int = 0) -> None:
        """From now on append to a file, for Perfetto and the like, what happens when: see `Trace`.

        rank: as which the file shows it. `hvd-compress trace` puts the files of ranks, Horovod's timeline and those of
            torch.profiler together.
        """
        self.trace = Trace(path, rank)
        if self.spans is None:
            self.watch()
        else:
            self.spans.listener = self.trace.span

    @property
    def recording(self) -> bool:
        """Whether records are kept or written."""
        return self.history.maxlen != 0 or self.file is not None

    def _keep(self, record: ParameterStep | StepSeconds) -> None:
        self.history.append(record)
        if self.file is not None:
            self.file.add(record)

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
            self._keep(ParameterStep(step, name, raw_bytes, sent_bytes, rate, error))

    def settled(self, step: int) -> None:
        """Record where the time of `step` went, which is over."""
        if self.trace is not None:
            self.trace.step(step, perf_counter())
        if self.spans is not None and self.recording:
            now = dict(self.spans.seconds)
            self._keep(StepSeconds(step, **{kind: now[kind] - self._before[kind] for kind in now}))
            self._before = now

    def reset(self) -> None:
        """Forget all that was counted and recorded; go on recording what is watched."""
        watched, records, errors = self.spans is not None, self.history.maxlen or 0, self.errors
        file, trace = self.file, self.trace
        self.__init__()  # type: ignore[misc]
        self.file, self.trace = file, trace
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
