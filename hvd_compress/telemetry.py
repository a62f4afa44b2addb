"""What this rank handed to the network: bytes per parameter and in all, counted from the frames that were sent."""

from __future__ import annotations

from dataclasses import dataclass, field


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


@dataclass
class Telemetry:
    """Counts since the start, or since `reset`; of this rank only."""

    steps: int = 0
    compressed: Traffic = field(default_factory=Traffic)  # the tensors that are compressed
    total: Traffic = field(default_factory=Traffic)  # all tensors
    parameters: dict[str, Traffic] = field(default_factory=dict)

    def record(self, name: str, raw_bytes: int, sent_bytes: int, *, compressed: bool) -> None:
        self.parameters.setdefault(name, Traffic()).add(raw_bytes, sent_bytes)
        self.total.add(raw_bytes, sent_bytes)
        if compressed:
            self.compressed.add(raw_bytes, sent_bytes)

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]
