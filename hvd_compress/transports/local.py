"""N simulated ranks in one process, in lock step: for tests, predictions and scaling studies. No launcher needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..requests import ReduceOp
from .base import Pending, Transport

_OPS: dict[ReduceOp, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.MIN: torch.minimum,
}


class LocalWorld:
    """The meeting point of `size` simulated ranks.

    A collective is answered once every rank has posted it. A rank that waits has the others move on through their
    `polls`; if they cannot, the job would hang, and RuntimeError names who is missing.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1: {size}")
        self.transports = [LocalTransport(self, rank, size) for rank in range(size)]
        self.polls: dict[int, Callable[[], None]] = {}  # by rank: Engine.poll
        self._posted: dict[str, dict[int, Any]] = {}
        self._answers: dict[str, tuple[Any, set[int]]] = {}

    def post(self, name: str, rank: int, value: Any) -> None:
        posted = self._posted.setdefault(name, {})
        if rank in posted:
            raise RuntimeError(f"rank {rank} posted {name!r} twice")
        posted[rank] = value

    def missing(self, name: str) -> list[int]:
        posted = self._posted.get(name, {})
        return [transport.rank for transport in self.transports if transport.rank not in posted]

    def answer(self, name: str, rank: int, combine: Callable[[list[Any]], Any]) -> Any:
        """What `combine` makes of all ranks' values, in rank order; it is called once for all of them."""
        if name not in self._answers:
            posted = self._posted.pop(name)
            self._answers[name] = combine([posted[r] for r in sorted(posted)]), set(posted)
        answer, takers = self._answers[name]
        takers.remove(rank)
        if not takers:
            del self._answers[name]
        return answer

    def answered(self, name: str, rank: int) -> bool:
        return rank in self._answers[name][1] if name in self._answers else not self.missing(name)


class _LocalPending(Pending):
    def __init__(
        self,
        world: LocalWorld,
        rank: int,
        name: str,
        combine: Callable[[list[Any]], Any],
        pick: Callable[[Any], Any],
    ) -> None:
        self._world, self._rank, self._name, self._combine, self._pick = world, rank, name, combine, pick

    def ready(self) -> bool:
        return self._world.answered(self._name, self._rank)

    def await_ready(self, meanwhile: Callable[[], None] | None = None) -> None:
        if not self.ready():
            for rank, poll in self._world.polls.items():
                if rank != self._rank:
                    poll()
        if not self.ready():
            raise RuntimeError(f"ranks {self._world.missing(self._name)} never posted {self._name!r}")

    def wait(self) -> Any:
        self.await_ready()
        return self._pick(self._world.answer(self._name, self._rank, self._combine))


class LocalTransport(Transport):
    """Rank `rank` of a LocalWorld."""

    def __init__(self, world: LocalWorld, rank: int, size: int) -> None:
        self.world, self.rank, self.size = world, rank, size

    def allreduce(self, name: str, tensor: Tensor, op: ReduceOp) -> Pending:
        return self._post(name, tensor, lambda tensors: reduce(_OPS[op], _alike(tensors)), Tensor.clone)

    def allgather(self, name: str, parts: Sequence[Tensor]) -> Pending:
        return self._post(name, _joined(parts), lambda buffers: buffers, list)

    def broadcast(self, name: str, tensor: Tensor, root: int) -> Pending:
        return self._post(name, tensor, lambda tensors: tensors[root], Tensor.clone)

    def alltoall(self, name: str, parts: Sequence[Sequence[Tensor]]) -> Pending:
        buffers = [_joined(destination) for destination in parts]
        return self._post(name, buffers, lambda sent: sent, lambda sent: [source[self.rank] for source in sent])

    def hosts(self) -> list[str]:
        """All in this process, and none of them can wait for the others before they are all made."""
        return ["localhost"] * self.size

    def _post(self, name: str, value: Any, combine: Callable[[list[Any]], Any], pick: Callable[[Any], Any]) -> Pending:
        self.world.post(name, self.rank, value)
        return _LocalPending(self.world, self.rank, name, combine, pick)


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        raise RuntimeError(f"ranks reduce tensors of shapes {[tuple(tensor.shape) for tensor in tensors]}")
    return tensors


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.uint8)
