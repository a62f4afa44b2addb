"""Records the collectives of one simulated rank: what it receives in each, and how much of it from other nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..requests import ReduceOp
from ..transports.base import Pending, Then, Transport

ALLREDUCE, ALLGATHER, ALLTOALL, BROADCAST = "allreduce", "allgather", "alltoall", "broadcast"


@dataclass(frozen=True)
class Collective:
    """One collective of a step, as one rank sees it.

    Sums count as of a ring, in two rounds of (size - 1) / size.
    """

    kind: str
    bucket: str
    round: int  # of the bucket's
    received_bytes: float
    outside_bytes: float  # of these, from ranks on other nodes


class Recorder:
    """Keeps in `collectives` what `transport`, of simulated ranks, takes part in; ranks of a node follow each other."""

    def __init__(self, transport: Transport, ranks_per_node: int = 1) -> None:
        self.collectives: list[Collective] = []
        self.rank, self.size = transport.rank, transport.size
        first = self.rank // ranks_per_node * ranks_per_node
        self._node = range(first, first + ranks_per_node)
        for kind in (ALLREDUCE, ALLGATHER, ALLTOALL, BROADCAST):
            setattr(transport, kind, self._recorded(kind, getattr(transport, kind)))

    @property
    def outside_bytes(self) -> float:
        """All that came from other nodes."""
        return sum(collective.outside_bytes for collective in self.collectives)

    def _recorded(self, kind: str, usual: Callable[..., Pending]) -> Callable[..., Pending]:
        def post(name: str, *arguments: Any) -> Pending:
            return Then(usual(name, *arguments), lambda answer: self._added(kind, name, answer, arguments))

        return post

    def _added(self, kind: str, name: str, answer: Tensor | Sequence[Tensor], arguments: Sequence[Any]) -> Any:
        if not isinstance(answer, Tensor):
            sizes = [buffer.numel() for buffer in answer]
            received = float(sum(sizes) - sizes[self.rank])
            outside = float(sum(size for rank, size in enumerate(sizes) if rank not in self._node))
        else:
            received = float(answer.numel() * answer.element_size())
            if isinstance(arguments[-1], ReduceOp):
                received *= 2 * (self.size - 1) / self.size
            elif arguments[-1] == self.rank:  # the root of a broadcast
                received = 0.0
            outside = received
        _, bucket, number, *_ = [*name.split("."), "0", "0"]
        self.collectives.append(Collective(kind, bucket, int(number) if number.isdigit() else 0, received, outside))
        return answer
