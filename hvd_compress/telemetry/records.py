"""What telemetry consists of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Bytes of gradients as they are, and of what was sent in their place, headers included."""

    raw_bytes: int = 0
    sent_bytes: int = 0

    @property
    def compression_ratio(self) -> float:
        """Raw bytes / sent bytes: larger is smaller messages."""
        return self.raw_bytes / self.sent_bytes if self.sent_bytes else float("nan")

    def add(self, raw_bytes: int, sent_bytes: int) -> None:
        self.raw_bytes += raw_bytes
        self.sent_bytes += sent_bytes


@dataclass(frozen=True)
class ParameterStep:
    """One parameter in one step.

    rate: density, bits, rank and so on, as its controller or its compressor has it; None where there is no such thing.
    error: what was not sent, as a part of what was to be, by L2 norms; None if that was not asked for, NaN where the
        gradient was not finite.
    """

    step: int
    parameter: str
    raw_bytes: int
    sent_bytes: int
    rate: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of one step went, see Spans; what a communication thread did meanwhile is not in it."""

    step: int
    encode: float
    exchange: float
    decode: float
    python: float
    kernels: float  # the part of encode and decode that was in C++


@dataclass(frozen=True)
class Collective:
    """One collective operation: the bytes that this rank gave to it, and how long after that its answer was taken.

    waited: that was as soon as it was there, since the rank had nothing else to do; otherwise the seconds are an upper
        limit. Either way they hold the time in which other ranks were late.
    """

    kind: str  # allgather, allreduce.sum.torch.float32.cpu, ...
    sent_bytes: int
    seconds: float
    waited: bool
