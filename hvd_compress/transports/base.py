"""What the engine asks of a transport, and how requests of a kind are fused into one collective."""

from __future__ import annotations

import abc
import itertools
import json
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import wire
from ..requests import Allgather, AllgatherParts, Allreduce, Alltoall, AlltoallParts, Broadcast, ReduceOp, Request

_PATIENCE_SECONDS = 1.0  # of a wait, before and between looks for ranks that have left
_POLLS = 100  # before a thread that waits starts to sleep
_SHORTEST_SLEEP_SECONDS, _LONGEST_SLEEP_SECONDS = 1e-4, 1e-3


class Pending(abc.ABC):
    """A collective under way."""

    @abc.abstractmethod
    def ready(self) -> bool:
        """Whether `wait` would return at once."""

    @abc.abstractmethod
    def wait(self) -> Any:
        """The answer."""

    def await_ready(  # noqa: B027  # what `wait` would wait for may be all there is to wait for
        self, meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Wait, but take no answer yet; call `meanwhile` again and again."""


class PolledPending(Pending):
    """One that tells by itself when it is done."""

    def await_ready(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Poll, and leave the core to others between polls: Horovod's and MPI's own waits keep it busy."""
        started = 0.0
        for poll in itertools.count():
            if self.ready():
                return
            if meanwhile is not None:
                meanwhile()
            if poll == _POLLS:
                started = time.perf_counter()
            elif poll > _POLLS:  # the longer it takes, the less a look in time is worth
                waited = time.perf_counter() - started
                time.sleep(min(max(waited / 32, _SHORTEST_SLEEP_SECONDS), _LONGEST_SLEEP_SECONDS))


class WatchedPending(PolledPending):
    """One of a transport that looks for ranks that have left, which its library waits for without end."""

    def __init__(self, transport: WatchfulTransport, number: int | None = None) -> None:
        """number: of the collective that this is a part of; None for the next one."""
        self._transport = transport
        if number is None:
            transport.posted += 1
        self._number = transport.posted if number is None else number
        self._look = time.monotonic() + _PATIENCE_SECONDS

    @abc.abstractmethod
    def done(self) -> bool:
        """What the library says."""

    def ready(self) -> bool:
        if self.done():
            return True
        if time.monotonic() > self._look:
            self._transport.check_peers(self._number)
            self._look = time.monotonic() + _PATIENCE_SECONDS
        return False


class Then(Pending):
    """A collective whose answer goes through `transform`."""

    def __init__(self, pending: Pending, transform: Callable[[Any], Any]) -> None:
        self._pending, self._transform = pending, transform

    def ready(self) -> bool:
        return self._pending.ready()

    def await_ready(self, meanwhile: Callable[[], None] | None = None) -> None:
        self._pending.await_ready(meanwhile)

    def wait(self) -> Any:
        return self._transform(self._pending.wait())


class Transport(abc.ABC):
    """One rank's access to the others. The primitives move one flat tensor each; `post` fuses requests into them."""

    rank: int
    size: int
    shared: ClassVar[bool] = False  # with operations of the program, which are matched by how many there were before

    @abc.abstractmethod
    def allreduce(self, name: str, tensor: Tensor, op: ReduceOp) -> Pending:
        """Answer: the reduced tensor [n]; `tensor` may be overwritten."""

    @abc.abstractmethod
    def allgather(self, name: str, parts: Sequence[Tensor]) -> Pending:
        """Answer: for every rank the concatenation of its uint8 parts, at an offset that is a multiple of 4."""

    def regather(self, name: str, parts: Sequence[Tensor]) -> Pending:
        """As allgather, of messages that come in every step, mostly as long as the last ones of this name."""
        return self.allgather(name, parts)

    @abc.abstractmethod
    def broadcast(self, name: str, tensor: Tensor, root: int) -> Pending:
        """Answer: the tensor [n] of rank `root`; `tensor` may be overwritten."""

    @abc.abstractmethod
    def alltoall(self, name: str, parts: Sequence[Sequence[Tensor]]) -> Pending:
        """Answer: as of allgather, for the parts that every rank addressed to this one; `parts` is by destination."""

    def is_current(self) -> bool:
        """Whether this still is the set of ranks that it was made for."""
        return True

    def leave(self) -> None:  # noqa: B027  # most transports notice by themselves
        """Tell the other ranks, should they ever wait for this one, that it takes part no longer."""

    def abort(self) -> None:
        """End all ranks at once."""
        raise NotImplementedError

    def post(self, name: str, requests: Sequence[Request]) -> Pending:
        """Start one collective for requests of one kind. Answer: their answers, in order."""
        first = requests[0]
        if isinstance(first, Allreduce):
            flat, restore = _fuse([request.tensor for request in requests])  # type: ignore[union-attr]
            return Then(self.allreduce(name, flat, first.op), restore)
        if isinstance(first, Broadcast):
            flat, restore = _fuse([request.tensor for request in requests])  # type: ignore[union-attr]
            return Then(self.broadcast(name, flat, first.root), restore)
        if isinstance(first, Allgather):
            parts = [request.frame for request in requests]  # type: ignore[union-attr]
            return Then(self.regather(name, parts), lambda buffers: _frames(buffers, len(requests)))
        if isinstance(first, AllgatherParts):  # one request, always
            return Then(self.regather(name, first.parts), lambda buffers: [buffers])
        if isinstance(first, AlltoallParts):
            return Then(self.alltoall(name, first.parts), lambda buffers: [buffers])
        assert isinstance(first, Alltoall)
        by_destination = list(zip(*(request.frames for request in requests)))  # type: ignore[union-attr]
        return Then(self.alltoall(name, by_destination), lambda buffers: _frames(buffers, len(requests)))

    def gather_objects(self, name: str, value: Any) -> Pending:
        """Answer: every rank's JSON-serializable `value`, in rank order."""
        pending = self.allgather(name, [_json_bytes(value)])
        return Then(pending, lambda buffers: [json.loads(buffer.numpy().tobytes()) for buffer in buffers])

    def hosts(self) -> list[str]:
        """The host of every rank. Waits."""
        hosts: list[str] = self.gather_objects("hvd_compress.hosts", socket.gethostname()).wait()
        return hosts

    def broadcast_object(self, value: Any, root: int) -> Any:
        """The JSON-serializable `value` of rank `root`. Waits."""
        return self.gather_objects("hvd_compress.object", value if self.rank == root else None).wait()[root]


class WatchfulTransport(Transport):
    """One whose library does not tell that a rank takes part no longer."""

    posted = 0  # collectives so far, the same ones on every rank

    @abc.abstractmethod
    def check_peers(self, number: int) -> None:
        """Raise RuntimeError if a rank has left before the collective of this number."""


def _json_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _fuse(tensors: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """One flat copy of `tensors`, and the function that cuts such a tensor into their shapes."""
    flat = torch.cat([tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors])

    def restore(fused: Tensor) -> list[Tensor]:
        parts = fused.split_with_sizes([tensor.numel() for tensor in tensors])
        return [part if tensor.dim() == 1 else part.view(tensor.shape) for part, tensor in zip(parts, tensors)]

    return flat, restore


def _frames(buffers: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The frames of each of `count` requests, in rank order."""
    by_rank = [wire.split(buffer, count, peer) for peer, buffer in enumerate(buffers)]
    return [list(frames) for frames in zip(*by_rank)]
