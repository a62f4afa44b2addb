"""Bytes and ratios."""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress.requests import Allgather, Allreduce, Alltoall, Broadcast, sent_bytes
from hvd_compress.telemetry import Telemetry, Traffic


def test_a_ratio_is_raw_over_sent():
    traffic = Traffic()
    assert math.isnan(traffic.compression_ratio)
    traffic.add(400, 25)
    traffic.add(400, 75)
    assert (traffic.raw_bytes, traffic.sent_bytes, traffic.compression_ratio) == (800, 100, 8.0)


def test_tensors_count_by_name_in_all_and_among_the_compressed():
    telemetry = Telemetry()
    telemetry.record("w", 400, 40, compressed=True)
    telemetry.record("b", 40, 40, compressed=False)
    telemetry.record("w", 400, 60, compressed=True)
    assert telemetry.parameters == {"w": Traffic(800, 100), "b": Traffic(40, 40)}
    assert telemetry.compressed == Traffic(800, 100)
    assert telemetry.total == Traffic(840, 140)


def test_a_reset_forgets_all():
    telemetry = Telemetry()
    before = telemetry.total
    telemetry.steps = 3
    telemetry.record("w", 400, 40, compressed=True)
    telemetry.reset()
    assert telemetry == Telemetry()
    assert before.raw_bytes == 400


FRAME, TENSOR = torch.zeros(40, dtype=torch.uint8), torch.zeros(3, 5, dtype=torch.float16)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Allgather(FRAME), 40),
        (Allreduce(TENSOR), 30),
        (Alltoall([FRAME, FRAME[:8]]), 48),
        (Broadcast(TENSOR, 1), 30),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_request_costs_its_frames_or_its_tensor(request_, expected):
    assert sent_bytes(request_) == expected
