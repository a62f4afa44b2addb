"""How fast pairs of ranks reach each other, by the collectives that gradients travel by."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..requests import ReduceOp
from ..transports.base import Transport

_MOST_PAIRS = 28  # all of up to eight ranks; of more, each and the next
_LATENCY_ROUNDS = 15
_SIZES = (1 << 18, 1 << 22, 1 << 25)  # bytes; the next one where the last took less than _ENOUGH_SECONDS
_ENOUGH_SECONDS = 0.2  # short messages pass through buffers faster than the network goes on at

Link = dict[str, Any]  # ranks, seconds there and back, bits a second one way


def pairs_of(size: int) -> list[tuple[int, int]]:
    """Those that are measured, one after the other."""
    every = list(itertools.combinations(range(size), 2))
    return every if len(every) <= _MOST_PAIRS else [(rank, (rank + 1) % size) for rank in range(size)]


def measure(transport: Transport) -> list[Link]:
    """To be called on every rank; all of them get all links."""
    return [_measure(transport, pair) for pair in pairs_of(transport.size)]


Add = Callable[[Tensor], Any]


def measure_sums(transport: Transport, add: Add | None = None) -> float:
    """Bits a second that come into each rank when all of them add up a large tensor: as many as around a ring.

    add: how, in place and to its end; None for the transport's own allreduce.
    """
    add = add or (lambda tensor: transport.allreduce("hvd_compress.doctor.sum", tensor, ReduceOp.SUM).wait())
    _seconds_of_sum(transport, add, 8)
    for size in _SIZES:
        seconds = min(_seconds_of_sum(transport, add, size) for _ in range(3))
        if seconds > _ENOUGH_SECONDS:
            break
    return 8 * 2 * size * (transport.size - 1) / transport.size / seconds


def _seconds_of_sum(transport: Transport, add: Add, size: int) -> float:
    tensor = torch.zeros(size // 4)
    slowest(transport, 0.0)
    start = time.perf_counter()
    add(tensor)
    return slowest(transport, time.perf_counter() - start)


def _measure(transport: Transport, pair: Sequence[int]) -> Link:
    _seconds(transport, pair, 8)
    latency = statistics.median(_seconds(transport, pair, 8) for _ in range(_LATENCY_ROUNDS))
    for size in _SIZES:
        seconds = min(_seconds(transport, pair, size) for _ in range(2))
        if seconds > _ENOUGH_SECONDS:
            break
    return {"ranks": list(pair), "latency_seconds": latency, "bits_per_second": 8 * size / seconds}


def _seconds(transport: Transport, pair: Sequence[int], size: int) -> float:
    """Of a message each way between two ranks, the slower one's; the same number on all ranks."""
    nothing: list[Tensor] = []
    parts = [nothing] * transport.size
    if transport.rank in pair:
        (other,) = set(pair) - {transport.rank}
        parts = [[torch.zeros(size, dtype=torch.uint8)] if rank == other else nothing for rank in range(transport.size)]
    slowest(transport, 0.0)
    start = time.perf_counter()
    transport.alltoall("hvd_compress.doctor.link", parts).wait()
    return slowest(transport, time.perf_counter() - start if transport.rank in pair else 0.0)


def slowest(transport: Transport, seconds: float) -> float:
    """Wait for all ranks; the longest of their times, the same number on all."""
    longest = transport.allreduce("hvd_compress.slowest", torch.tensor([seconds]), ReduceOp.MAX).wait()
    return float(longest)
