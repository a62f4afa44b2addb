"""Horovod's public named asynchronous operations as a transport, on MPI or Gloo. The only file that imports horovod."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from ..anchor import anchored
from ..requests import ReduceOp
from ..wire import WireError
from .base import Pending, PolledPending, Transport

_OPS = {ReduceOp.SUM: hvd.Sum, ReduceOp.MAX: hvd.Max, ReduceOp.MIN: hvd.Min}
_LENGTH_BYTES = 8  # Horovod's allgather does not tell who sent how much
_ROW_BYTES = 16
# Horovod counts what a gather brings together in an int: of elements, which are of eight bytes here.
MAX_ELEMENTS = (1 << 31) - 1

_posted: dict[Any, str] = {}  # names of operations by handle, until they are synchronized


def outstanding() -> list[str]:
    """Names of the operations that this process has posted, and the other ranks have not all taken part in yet.

    While there are any, `hvd.join()` must not be called: Horovod would take them for operations of all ranks.
    """
    return [name for handle, name in _posted.items() if not hvd.poll(handle)]


class _HorovodPending(PolledPending):
    def __init__(self, name: str, handle: Any, transform: Callable[[Any], Any], anchors: object) -> None:
        self._handle, self._transform, self._anchors = handle, transform, anchors
        _posted[handle] = name

    def ready(self) -> bool:
        return bool(hvd.poll(self._handle))

    def wait(self) -> Any:
        try:
            self.await_ready()
            _posted.pop(self._handle, None)
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

    shared = True

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
        return self._post(hvd.allreduce_async_, name, _same, tensor, op=_OPS[op])

    def allgather(self, name: str, parts: Sequence[Tensor]) -> Pending:
        rows = _rows(parts)
        if rows.numel() * self.size > MAX_ELEMENTS:
            raise ValueError(
                f"a message of {rows.numel() * 8 / 1e9:.1f} GB from each of {self.size} ranks is more than Horovod can "
                f"gather at once, {MAX_ELEMENTS * 8 / 1e9:.1f} GB: choose a method that sends less, or a smaller "
                "bucket_bytes="
            )
        return self._post(hvd.allgather_async, name, _cut, rows.view(-1, self._width(name)))

    def broadcast(self, name: str, tensor: Tensor, root: int) -> Pending:
        rows = tensor.view(1, -1) if self._width(name) == 1 else tensor.view(-1, 1)
        return self._post(hvd.broadcast_async_, name, _flat, rows, root_rank=self.members[root])

    def alltoall(self, name: str, parts: Sequence[Sequence[Tensor]]) -> Pending:
        width = self._width(name)
        buffers = [_rows(destination).view(-1, width) for destination in parts]
        splits = torch.tensor([len(buffer) for buffer in buffers], dtype=torch.int32)
        return self._post(hvd.alltoall_async, name, _cut_received, torch.cat(buffers), splits)

    def _post(
        self,
        operation: Callable[..., Any],
        name: str,
        transform: Callable[[Any], Any],
        tensor: Tensor,
        splits: Tensor | None = None,
        **options: Any,
    ) -> Pending:
        posted, anchors = _posting(tensor)
        if splits is not None:
            options["splits"], of_splits = _posting(splits)
            anchors += of_splits
        handle = operation(posted, name=name, process_set=self._set, **options)
        return _HorovodPending(name, handle, transform, anchors)

    def _width(self, name: str) -> int:
        """1 and 2 in turn: another shape than last time, so that Horovod negotiates this collective each time.

        When a rank has called hvd.join(), negotiating says that these collectives cannot go on. One that Horovod's
        response cache knows, by its name and shape, is not negotiated: then the other ranks would wait for ever.
        """
        self._widths[name] = 3 - self._widths.get(name, 2)
        return self._widths[name]


def _posting(tensor: Tensor) -> tuple[Tensor, list[Any]]:
    """`tensor` for Horovod, which makes the answer by its `new`, and the anchors of both.

    The answer's is made before Horovod has it, whose thread gives it its size.
    """
    posted, anchor = anchored(tensor.data)  # of whose `new` no one else knows
    dtype, device = tensor.dtype, tensor.device
    answers: list[Tensor] = []  # nothing here leads back to what was posted: it would never be freed

    def new() -> Tensor:
        answer, anchor = anchored(torch.empty(0, dtype=dtype, device=device))
        answers.append(anchor)
        return answer

    posted.new = new  # type: ignore[method-assign, assignment]
    return posted, [anchor, answers]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1)


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """The parts in one buffer behind their total length, padded to a multiple of _ROW_BYTES; as int64."""
    length = sum(part.numel() for part in parts)
    padding = torch.zeros(_padding(length), dtype=torch.uint8)
    return torch.cat([torch.tensor([length]).view(torch.uint8), *parts, padding]).view(torch.int64)


def _padding(length: int) -> int:
    return -(_LENGTH_BYTES + length) % _ROW_BYTES


def _cut_received(answer: tuple[Tensor, Tensor]) -> list[Tensor]:
    return _cut(answer[0])


def _cut(gathered: Tensor) -> list[Tensor]:
    """Undo `_rows` for every rank in turn."""
    gathered = gathered.view(-1).view(torch.uint8)
    buffers: list[Tensor] = []
    offset = 0
    while offset < gathered.numel():
        start = offset + _LENGTH_BYTES
        length = int(gathered[offset:start].view(torch.int64))
        if not 0 <= length <= gathered.numel() - start:
            raise WireError(len(buffers), "?", f"a length up to {gathered.numel() - start}", length)
        buffers.append(gathered[start : start + length])
        offset = start + length + _padding(length)
    return buffers
