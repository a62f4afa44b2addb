"""ScaleCom inside a job: what a rank sends is the same at every number of ranks."""

from __future__ import annotations

import math

import pytest

from hvd_compress import Compression
from hvd_compress.kernels import position_bytes

from .job import Job
from .training import OPTIONS, assert_replicated, backward, gradients, parameters, sgd

SHAPES = {"a": (60, 50), "c": (40, 100)}
ENTRIES = {"density": {"density": 0.05}, "chunk": {"chunk": 20}}  # of both, a twentieth
CARRIER_BYTES = 8  # of each parameter under Horovod


@pytest.mark.parametrize("options", ENTRIES.values(), ids=ENTRIES)
def test_a_rank_sends_as_much_however_many_there_are(several: Job, options: dict[str, float]) -> None:
    of = parameters(SHAPES)
    compression = Compression.scalecom(of.items(), **options, **OPTIONS)
    optimizer = several.distribute(sgd(of), of.items(), compression)
    # Positions, a value an entry, and a flag a tensor: no word of how many ranks there are.
    expected = sum(
        position_bytes(numel, numel // 20) + 4 * (numel // 20) + 4 for numel in map(math.prod, SHAPES.values())
    )
    expected += CARRIER_BYTES * len(SHAPES) * several.is_horovod
    for step in range(2 * several.size):  # every rank leads twice
        compression.telemetry.reset()
        optimizer.zero_grad()
        backward(of, gradients(of, several.rank, step))
        optimizer.step()
        assert compression.telemetry.total.sent_bytes == expected
    assert set(several.allgather(compression.telemetry.total.sent_bytes)) == {expected}
    assert_replicated(several, of)
