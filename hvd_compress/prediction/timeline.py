"""Computes when a step ends: buckets are encoded during backward, their collectives follow one another on the link."""

from __future__ import annotations

import dataclasses
import heapq
import math
from dataclasses import dataclass

from .traffic import ALLREDUCE, Collective
from .work import Work

PAYLOAD = 0.94  # of what an Ethernet link carries: frames of 1538 bytes on the wire have 1448 of TCP's payload


@dataclass(frozen=True)
class Cluster:
    """Ranks, and the link that joins their nodes.

    bandwidth: payload bytes a second of a node's link, each way at once.
    latency_seconds: of a message between two nodes.
    sum_bandwidth: as bandwidth, of what adds up around a ring; None for the same.
    cycle_seconds: of the thread that starts collectives, Horovod's HOROVOD_CYCLE_TIME; 0 where they start at once.

    Raises ValueError for ranks that share one node, or do not fill their nodes.
    """

    ranks: int
    bandwidth: float
    latency_seconds: float = 50e-6
    ranks_per_node: int = 1
    cycle_seconds: float = 1e-3
    sum_bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.ranks < 2 or self.ranks <= self.ranks_per_node or self.ranks % self.ranks_per_node:
            raise ValueError(
                f"{self.ranks} ranks, {self.ranks_per_node} on a node: there must be at least two nodes, and all full"
            )
        if not self.bandwidth > 0 or not self.latency_seconds >= 0 or not self.cycle_seconds >= 0:
            raise ValueError(f"the bandwidth must be positive, latency and cycle not negative: {self}")

    def seconds(self, collective: Collective, share: float = 1.0) -> float:
        """Of one collective that moves that share of the bytes.

        A sum comes into a node as one rank's, whose ring enters it once; all else as that of all its ranks.
        """
        size, messages = share * collective.outside_bytes, math.ceil(math.log2(self.ranks))
        if collective.kind == ALLREDUCE:
            seconds = 2 * messages * self.latency_seconds + size / (self.sum_bandwidth or self.bandwidth)
        else:
            seconds = messages * self.latency_seconds + size * self.ranks_per_node / self.bandwidth
        return self.cycle_seconds / 2 + seconds

    def at(self, bandwidth: float) -> Cluster:
        """With another link; sums are as much slower than the rest as they were."""
        sums = None if self.sum_bandwidth is None else self.sum_bandwidth / self.bandwidth * bandwidth
        return dataclasses.replace(self, bandwidth=bandwidth, sum_bandwidth=sums)


@dataclass(frozen=True)
class Compute:
    """What a step takes without any communication, in seconds: the backward pass, and all else."""

    backward_seconds: float
    other_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.backward_seconds + self.other_seconds


@dataclass(frozen=True)
class Step:
    """A step: how long it takes, and how much of that is due to the exchange of gradients."""

    seconds: float
    exposed_seconds: float
    link_seconds: float  # that the link is busy


def predicted(work: Work, cluster: Cluster, compute: Compute, *, python_seconds: float = 30e-6) -> Step:
    """When a step ends in which gradients come evenly during backward.

    The thread that computes encodes a bucket once its last gradient is there, and decodes the buckets in order at the
    end of backward. A bucket's next round begins when the last one has ended, and the link carries one collective after
    the other. `python_seconds`: of this library, for each tensor.
    """
    buckets = work.buckets
    python = python_seconds * work.tensors / buckets
    now = 0.0
    waiting: list[tuple[float, int, int]] = []  # since when, bucket, round
    for bucket in range(buckets):
        now += (compute.backward_seconds + work.encode_seconds) / buckets + python
        heapq.heappush(waiting, (now, bucket, 0))
    ends, free, busy = [0.0] * buckets, 0.0, 0.0
    while waiting:
        since, bucket, number = heapq.heappop(waiting)
        if number == len(work.rounds):
            ends[bucket] = since
            continue
        seconds = sum(cluster.seconds(collective, 1 / buckets) for collective in work.rounds[number])
        free = max(since, free) + seconds
        busy += seconds
        heapq.heappush(waiting, (free, bucket, number + 1))
    for end in ends:
        now = max(now, end) + work.decode_seconds / buckets
    return Step(now + compute.other_seconds, now - compute.backward_seconds, busy)
