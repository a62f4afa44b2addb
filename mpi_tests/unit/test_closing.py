"""What is said at the end of a job."""

from __future__ import annotations

import pytest

from hvd_compress.telemetry import Collective, Telemetry, summary
from hvd_compress.telemetry.closing import seconds_a_byte

BYTE_SECONDS = 1e-8  # of a link of 100 MB/s


def gather(size: int, *, ranks: int = 2, factor: float = 1.0, waited: bool = True) -> Collective:
    return Collective("allgather", size, size * (ranks - 1) * BYTE_SECONDS * factor, waited)


def test_quartiles_are_of_the_larger_messages_that_were_waited_for():
    found = [gather(1_000_000, factor=factor) for factor in [1.0, 1.2, 1.4] * 10]
    small = [gather(20_000, factor=50.0)] * 100
    others = [gather(1_000_000, factor=9.0, waited=False)] * 100
    expected = pytest.approx((1.0 * BYTE_SECONDS, 1.2 * BYTE_SECONDS, 1.4 * BYTE_SECONDS))
    assert seconds_a_byte([*found, *small, *others], 2) == expected


@pytest.mark.parametrize(
    ("kind", "received"),
    [("allgather", 3_000_000), ("alltoall", 1_000_000), ("allreduce.sum.torch.float32.cpu", 1_500_000)],
)
def test_bytes_are_those_that_a_rank_receives(kind, received):
    collectives = [Collective(kind, 1_000_000, received * BYTE_SECONDS, waited=True)] * 30
    assert seconds_a_byte(collectives, 4) == pytest.approx((BYTE_SECONDS,) * 3)


@pytest.mark.parametrize(
    "collectives", [[], [gather(1_000_000)] * 19, [gather(1000)] * 100, [gather(1_000_000, waited=False)] * 100]
)
def test_nothing_is_said_of_a_link_that_too_little_is_known_of(collectives):
    assert seconds_a_byte(collectives, 2) is None
    telemetry = Telemetry(steps=5)
    telemetry.collectives.extend(collectives)
    assert "Without compression" not in summary(telemetry, 2)


def test_the_ring_without_compression_takes_its_bytes_at_that_pace():
    telemetry = Telemetry(steps=100)
    telemetry.total.add(raw_bytes=100 * 40_000_000, sent_bytes=100 * 1_000_000)
    telemetry.collectives.extend(gather(250_000, ranks=4, factor=factor) for factor in [1.0, 1.2, 1.4] * 10)
    said = summary(telemetry, 4)
    assert said.startswith("100 steps of 4 ranks: this one sent 1.000 MB a step in place of 40.000, 40 times fewer. ")
    # 2 * 3 / 4 * 40 MB at 100 MB/s are 600 ms.
    assert "720 ms or less" in said
    assert "(600 to 840 by their quartiles)" in said
    assert "waited" not in said


def test_waiting_is_told_where_it_is_watched():
    telemetry = Telemetry(steps=4)
    telemetry.watch_time()
    telemetry.spans.seconds["exchange"] = 0.1
    assert "It waited 25.0 ms a step for answers." in summary(telemetry, 2)
    assert summary(Telemetry(), 2).startswith("0 steps of 2 ranks: ")
