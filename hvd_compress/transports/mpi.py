"""mpi4py as a transport. MPI matches collectives by their order: all ranks must post them in the same one."""

from __future__ import annotations

import atexit
import functools
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from ..requests import ReduceOp
from .base import Pending, WatchedPending
from .rooms import RoomTransport

CHUNK_BYTES = 1 << 30  # of one MPI call: counts and displacements are 32-bit integers
_LEAVING, _REST = 1, 2  # tags: a rank takes part no longer; what follows a collective
_LINGER_SECONDS = 60.0  # at the end of the program, for the other ranks to come to theirs
_POLL_SECONDS = 0.01

_OPS = {ReduceOp.SUM: MPI.SUM, ReduceOp.MAX: MPI.MAX, ReduceOp.MIN: MPI.MIN}
_TORCH_OPS: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.MIN: torch.minimum,
}


class _MPIPending(WatchedPending):
    """Several MPI requests; holds their buffers until the last is done."""

    def __init__(
        self,
        transport: MPITransport,
        requests: Sequence[MPI.Request],
        answer: Callable[[], Any],
        buffers: object,
        number: int | None = None,
    ) -> None:
        super().__init__(transport, number)
        self._requests, self._answer, self._buffers = list(requests), answer, buffers

    def done(self) -> bool:
        return bool(MPI.Request.Testall(self._requests))

    def wait(self) -> Any:
        self.await_ready()
        self._buffers = None
        return self._answer()


class MPITransport(RoomTransport):
    """The ranks of a duplicate of `comm`, so that the program's own traffic cannot be mistaken for this."""

    def __init__(self, comm: MPI.Comm) -> None:
        super().__init__()
        self.comm = comm.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self._left: dict[int, int] = {}  # how many of them the ranks took part in that do so no longer
        self._farewells: list[Any] = []  # held until MPI ends
        _transports.add(self)

    def allreduce(self, name: str, tensor: Tensor, op: ReduceOp) -> Pending:
        reduced = tensor.cpu()  # in place: fused tensors are copies already
        half = reduced.dtype == torch.float16
        array = reduced.view(torch.int16).numpy() if half else reduced.numpy()
        mpi_op = _half_op(op) if half else _OPS[op]
        requests = [self.comm.Iallreduce(MPI.IN_PLACE, chunk, mpi_op) for chunk in _chunks(array)]
        return _MPIPending(self, requests, lambda: reduced.to(tensor.device), array)

    def broadcast(self, name: str, tensor: Tensor, root: int) -> Pending:
        received = tensor.cpu().contiguous()
        array = received.view(torch.uint8).numpy()
        requests = [self.comm.Ibcast(chunk, root) for chunk in _chunks(array)]
        return _MPIPending(self, requests, lambda: received.to(tensor.device), array)

    @property
    def most_gathered_bytes(self) -> float:
        return CHUNK_BYTES

    def gather_rows(self, row: Tensor) -> Pending:
        rows = torch.empty(self.size, row.numel(), dtype=torch.uint8)
        return _MPIPending(self, [self.comm.Iallgather(row.numpy(), rows.numpy())], lambda: rows, row)

    def exchange_rows(self, rows: Tensor) -> Pending:
        exchanged = torch.empty_like(rows)
        return _MPIPending(self, [self.comm.Ialltoall(rows.numpy(), exchanged.numpy())], lambda: exchanged, rows)

    def follow(self, outgoing: Tensor, sizes: list[int], lengths: list[int], number: int) -> Pending:
        sent = outgoing.split(sizes) if outgoing.dim() == 1 else outgoing.unbind()
        incoming = [torch.empty(length, dtype=torch.uint8) for length in lengths]
        incoming[self.rank] = sent[self.rank]
        others = [rank for rank in range(self.size) if rank != self.rank]
        receives = [(peer, chunk) for peer in others for chunk in _chunks(incoming[peer].numpy())]
        sends = [(peer, chunk) for peer in others for chunk in _chunks(sent[peer].numpy())]
        requests = [self.comm.Irecv(chunk, peer, _REST) for peer, chunk in receives]
        requests += [self.comm.Isend(chunk, peer, _REST) for peer, chunk in sends]
        return _MPIPending(self, requests, lambda: incoming, sent, number)

    def leave(self) -> None:
        if self._farewells or MPI.Is_finalized():
            return
        posted = np.array([self.posted], dtype=np.int64)
        others = [rank for rank in range(self.size) if rank != self.rank]
        # So small that MPI sends it at once and waits for no receiver.
        self._farewells.append((posted, [self.comm.Isend(posted, rank, _LEAVING) for rank in others]))

    def check_peers(self, number: int) -> None:
        """Raise RuntimeError if a rank left before the collective of this number."""
        for rank, last in self._farewells_heard().items():
            if last < number:
                raise RuntimeError(
                    f"rank {rank} has ended its training, or its program, while rank {self.rank} still exchanges "
                    "gradients. Give every rank the same number of batches (drop or repeat the last ones)."
                )

    def alone(self) -> bool:
        """Whether all other ranks have left."""
        return len(self._farewells_heard()) == self.size - 1

    def abort(self) -> None:
        self.comm.Abort(1)

    def _farewells_heard(self) -> dict[int, int]:
        status = MPI.Status()
        # A matched probe, because at the end the engine's thread may look as well.
        while message := self.comm.Improbe(MPI.ANY_SOURCE, _LEAVING, status):
            posted = np.empty(1, dtype=np.int64)
            message.Recv(posted)
            self._left[status.source] = int(posted[0])
        return self._left


@functools.cache
def _half_op(op: ReduceOp) -> MPI.Op:
    """MPI knows no float16: reduce it by a function of ours. One for all transports, as mpi4py has room for few."""

    def reduce(incoming: Any, inout: Any, datatype: MPI.Datatype) -> None:
        a = torch.frombuffer(incoming, dtype=torch.float16)
        b = torch.frombuffer(inout, dtype=torch.float16)
        _TORCH_OPS[op](a, b, out=b)

    return MPI.Op.Create(reduce, commute=True)


def _chunks(array: np.ndarray) -> list[np.ndarray]:
    step = max(CHUNK_BYTES // array.itemsize, 1)
    return [array[start : start + step] for start in range(0, array.size, step)]


_transports: weakref.WeakSet[MPITransport] = weakref.WeakSet()


@atexit.register
def _stay_out_of_finalize() -> None:
    """Keep a rank that ends before the others out of MPI_Finalize while these may still abort the job.

    Open MPI 5's launcher can hang, with all ranks gone, where one fails while another waits in MPI_Finalize. Not under
    `python -m mpi4py`: there MPI_Finalize is what aborts the job if this rank fails.
    """
    if MPI.Is_finalized() or "mpi4py.run" in sys.modules:
        return
    waiting = list(_transports)
    for transport in waiting:
        transport.leave()
    deadline = time.monotonic() + _LINGER_SECONDS
    while not all(transport.alone() for transport in waiting) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
