"""What is said at the end of a job: bytes, time waited, and what no compression would have taken on this link."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from .counts import Telemetry
from .records import Collective

_LEAST_BYTES = 256 << 10  # of a message that tells something about a link: most of what shorter ones take is latency
_LEAST_SAMPLES = 20


def summary(telemetry: Telemetry, ranks: int) -> str:
    """Of one rank of `ranks`, in a few sentences; what cannot be told from what was recorded is left out.

    >>> telemetry = Telemetry(steps=10)
    >>> telemetry.total.add(raw_bytes=4_000_000, sent_bytes=40_000)
    >>> summary(telemetry, 2)
    '10 steps of 2 ranks: this one sent 0.004 MB a step in place of 0.400, 100 times fewer.'
    """
    steps, total = max(telemetry.steps, 1), telemetry.total
    said = [
        f"{telemetry.steps:,} steps of {ranks} ranks: this one sent {total.sent_bytes / steps / 1e6:.3f} MB a step in "
        f"place of {total.raw_bytes / steps / 1e6:.3f}, {total.compression_ratio:.3g} times fewer."
    ]
    if telemetry.spans is not None:
        waited = telemetry.spans.seconds["exchange"] / steps
        said.append(f"It waited {1e3 * waited:.1f} ms a step for answers.")
    if (seconds := seconds_a_byte(telemetry.collectives, ranks)) is not None:
        least, middle, most = (1e3 * each * ring_bytes(total.raw_bytes / steps, ranks) for each in seconds)
        said.append(
            f"Without compression, a step's gradients would be under way for {middle:.0f} ms or less, by the time that "
            f"the last messages took ({least:.0f} to {most:.0f} by their quartiles)."
        )
    return " ".join(said)


def seconds_a_byte(collectives: Iterable[Collective], ranks: int) -> tuple[float, float, float] | None:
    """Quartiles of what a received byte took, of the larger messages that were waited for; None where these are too few
    or too small to tell.

    An upper limit: latency is in it, and the time in which other ranks were late.
    """
    received = [(_received(one, ranks), one.seconds) for one in collectives if one.waited]
    largest = max((size for size, _ in received), default=0.0)
    found = [seconds / size for size, seconds in received if size >= max(largest / 2, _LEAST_BYTES)]
    if len(found) < _LEAST_SAMPLES:
        return None
    least, middle, most = statistics.quantiles(found, n=4)
    return least, middle, most


def _received(collective: Collective, ranks: int) -> float:
    """Bytes that come to a rank by it, about."""
    if collective.kind.startswith("allreduce"):
        return ring_bytes(collective.sent_bytes, ranks)
    return collective.sent_bytes * (ranks - 1 if collective.kind.startswith("allgather") else 1)


def ring_bytes(size: float, ranks: int) -> float:
    """What a rank receives where so many bytes are added up around a ring."""
    return 2 * size * (ranks - 1) / ranks
