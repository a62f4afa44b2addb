"""Horovod's public named asynchronous operations as a transport, on MPI or Gloo. The only file that imports horovod."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from ..requests import ReduceOp
from ..wire import WireError
from .base import Pending, PolledPending, Transport

_OPS = {ReduceOp.SUM: hvd.Sum, ReduceOp.MAX: hvd.Max, ReduceOp.MIN: hvd.Min}
_LENGTH_BYTES = 8  # Horovod's allgather does not tell who sent how much


class _HorovodPending(PolledPending):
    def __init__(self, handle: Any, transform: Callable[[Any], Any]) -> None:
        self._handle, self._transform = handle, transform

    def ready(self) -> bool:
        return bool(hvd.poll(self._handle))

    def wait(self) -> Any:
        try:
            self.await_ready()
            return self._transform(hvd.synchronize(self._handle))
        except HorovodInternalError as error:
            if "join" in str(error).lower():
                raise RuntimeError(
                    "a rank called hvd.join(), which Horovod cannot combine with the allgather that carries compressed "
                    "gradients. Give every rank the same number of batches (drop or repeat the last ones), or use "
                    "Compression.none or Compression.fp16."
                ) from error
            raise


class HorovodTransport(Transport):
    """The ranks of `process_set`, a horovod.torch.ProcessSet; None for all."""

    def __init__(self, process_set: Any = None) -> None:
        if not hvd.is_initialized():
            raise RuntimeError("Horovod is not initialized: call hvd.init() before the first backward pass")
        self._set = hvd.global_process_set if process_set is None else process_set
        if not self._set.included():
            raise RuntimeError(
                f"rank {hvd.rank()} is not in the process set {self._set} of this compression, yet its optimizer "
                "reduces gradients: give hvd.DistributedOptimizer and the compression the same process_set"
            )
        self.rank, self.size = self._set.rank(), self._set.size()
        self._widths: dict[str, int] = {}  # by name of the collective
        self.members: list[int] = list(self._set.ranks or range(self.size))  # their global ranks

    def is_current(self) -> bool:
        return bool(hvd.is_initialized()) and (self._set.rank(), self._set.size()) == (self.rank, self.size)

    def allreduce(self, name: str, tensor: Tensor, op: ReduceOp) -> Pending:
        return _HorovodPending(hvd.allreduce_async_(tensor, name=name, op=_OPS[op], process_set=self._set), _same)

    def allgather(self, name: str, parts: Sequence[Tensor]) -> Pending:
        rows = _with_length(parts).view(-1, self._width(name))
        handle = hvd.allgather_async(rows, name=name, process_set=self._set)
        return _HorovodPending(handle, _cut)

    def broadcast(self, name: str, tensor: Tensor, root: int) -> Pending:
        rows = tensor.view(1, -1) if self._width(name) == 4 else tensor.view(-1, 1)
        handle = hvd.broadcast_async_(rows, root_rank=self.members[root], name=name, process_set=self._set)
        return _HorovodPending(handle, lambda answer: answer.view(-1))

    def alltoall(self, name: str, parts: Sequence[Sequence[Tensor]]) -> Pending:
        width = self._width(name)
        buffers = [_with_length(destination).view(-1, width) for destination in parts]
        splits = torch.tensor([len(buffer) for buffer in buffers], dtype=torch.int32)
        handle = hvd.alltoall_async(torch.cat(buffers), splits=splits, name=name, process_set=self._set)
        return _HorovodPending(handle, lambda answer: _cut(answer[0]))

    def _width(self, name: str) -> int:
        """4 and 8 in turn: another shape than last time, so that Horovod negotiates this collective each time.

        When a rank has called hvd.join(), negotiating says that these collectives cannot go on. One that Horovod's
        response cache knows, by its name and shape, is not negotiated: then the other ranks would wait for ever.
        """
        self._widths[name] = 12 - self._widths.get(name, 8)
        return self._widths[name]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _with_length(parts: Sequence[Tensor]) -> Tensor:
    """The parts in one buffer behind their total length, padded to a multiple of 8."""
    length = sum(part.numel() for part in parts)
    padding = torch.zeros(-length % _LENGTH_BYTES, dtype=torch.uint8)
    return torch.cat([torch.tensor([length]).view(torch.uint8), *parts, padding])


def _cut(gathered: Tensor) -> list[Tensor]:
    """Undo `_with_length` for every rank in turn."""
    gathered = gathered.view(-1)
    buffers: list[Tensor] = []
    offset = 0
    while offset < gathered.numel():
        start = offset + _LENGTH_BYTES
        length = int(gathered[offset:start].view(torch.int64))
        if not 0 <= length <= gathered.numel() - start:
            raise WireError(len(buffers), "?", f"a length up to {gathered.numel() - start}", length)
        buffers.append(gathered[start : start + length])
        offset = start + length + -length % _LENGTH_BYTES
    return buffers


def is_single_rank() -> bool:
    return bool(hvd.is_initialized()) and hvd.size() == 1
