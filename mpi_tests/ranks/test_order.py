"""Ranks of the ordered engine that take answers at other times: none may wait for one that waits for it."""

from __future__ import annotations

import time

import pytest
import torch

from hvd_compress import wire
from hvd_compress.ordered_engine import OrderedEngine
from hvd_compress.requests import Allgather, Alltoall, Exchange

from .job import Job

_LATE_SECONDS = 0.1  # long enough for the thread of the engine to take what answers are there


def frame(rank: int, index: int, length: int) -> torch.Tensor:
    return wire.pack(wire.Frame(1, torch.float32, rank, index, 0.0, 1, torch.zeros(length, dtype=torch.uint8)))


def gathered(job: Job, index: int, length: int) -> Exchange:
    frames = yield Allgather(frame(job.rank, index, length), last=True)
    return [wire.unpack(found, peer).payload.numel() for peer, found in enumerate(frames)]


def exchanged(job: Job, index: int, length: int) -> Exchange:
    frames = yield Alltoall([frame(job.rank, index, length + to) for to in range(job.size)], last=True)
    return [wire.unpack(found, peer).payload.numel() for peer, found in enumerate(frames)]


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("late", ["first", "last"])
@pytest.mark.parametrize("seen", ["before", "never"])
def test_a_rank_may_take_an_answer_before_others_look(ordered: Job, late: str, seen: str, threaded: bool) -> None:
    """A gather that does not fit in its room, of which more follows, and behind it a bucket that one rank has later."""
    late_rank = 0 if late == "first" else ordered.size - 1
    engine = OrderedEngine(ordered.transport(), [[2], [1], [0]], threaded=threaded)
    for step, length in enumerate([8, 4000, 100, 70_000]):
        behind = 1 if seen == "before" or step == 0 else 0
        tickets = [engine.submit(2, gathered(ordered, 2, length))]
        if ordered.rank == late_rank:
            time.sleep(_LATE_SECONDS)
        tickets.append(engine.submit(behind, exchanged(ordered, behind, length)))
        assert engine.finish(tickets[0]) == [length] * ordered.size
        assert engine.finish(tickets[1]) == [length + ordered.rank] * ordered.size
    engine.close()
