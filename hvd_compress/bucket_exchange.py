"""Exchanges the gradients of DistributedDataParallel's buckets.

DDP calls its hook for one bucket after the other, in the same order on every rank, and rebuilds its buckets after the
first step: state stays by parameter. Exchanges start when a bucket comes, and run in a thread during backward; the call
for the last bucket of a pass finishes them all, so that gradients are whole when `backward()` returns.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .binding import real
from .engine import Ticket
from .followed_steps import FollowedSteps
from .gradient_compression import GradientCompression
from .transports.base import Transport


@dataclass
class _Running:
    """A gradient whose exchange has begun: a view of its bucket, but for a sparse one."""

    ticket: Ticket
    gradient: Tensor


@dataclass
class _Bucket:
    """What DDP waits for."""

    future: torch.futures.Future[Tensor]
    buffer: Tensor
    running: list[_Running]


class BucketExchange:
    """One compression's, over one set of ranks."""

    def __init__(self, compression: GradientCompression, transport: Transport) -> None:
        self._compression = weakref.ref(compression)  # which DDP holds
        self._transport = transport
        self._buckets: list[_Bucket] = []  # of the pass under way
        self.steps = FollowedSteps(compression)

    @property
    def compression(self) -> GradientCompression:
        compression = self._compression()
        assert compression is not None, "who calls holds it"
        return compression

    def is_current(self) -> bool:
        """Whether this still is the process group that the program trains on."""
        return self._transport.is_current()

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Start the exchange of a bucket; that of the last one finishes all of them."""
        compression, buffer = self.compression, bucket.buffer()
        on_cpu = buffer.device.type == "cpu"
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=None if on_cpu else [buffer.device])
        if compression.size == 1 and not compression.compressor.replaces:
            future.set_result(buffer)
            return future
        try:
            self._start(bucket, _Bucket(future, buffer, []))
            if bucket.is_last():
                self._finish()
        except BaseException:
            self._buckets.clear()
            raise
        return future

    def _start(self, bucket: dist.GradBucket, started: _Bucket) -> None:
        parameters = bucket.parameters()
        if bucket.index() == 0:
            if self._buckets:
                raise RuntimeError(
                    "this compression is the state of the hooks of two models whose backward passes overlap: make one "
                    "for each, bound to its own parameters"
                )
            self.steps.begin(parameters[0])
        self._buckets.append(started)
        indices = [self._index(parameter) for parameter in parameters]
        for index, gradient in zip(indices, _gradients(bucket)):
            exchanged = real(gradient)
            # DDP fills its buckets anew in the next backward pass, when a delayed exchange may yet read the gradient.
            mine = exchanged.clone() if self.compression.delays else exchanged
            ticket = self.compression.submit(index, mine, in_place=True)
            started.running.append(_Running(ticket, exchanged))

    def _index(self, parameter: Tensor) -> int:
        index = self.compression.binding.index_of.get(id(parameter))
        if index is None:
            raise ValueError(
                f"DistributedDataParallel reduces a parameter of shape {tuple(parameter.shape)} that is not among the "
                "named_parameters of this compression: bind it to all of net.named_parameters(), and make it after the "
                "last change of the model, such as SyncBatchNorm.convert_sync_batchnorm or .to(dtype)"
            )
        return index

    def _finish(self) -> None:
        buckets, self._buckets = self._buckets, []
        for bucket in buckets:
            result = bucket.buffer
            for running in bucket.running:
                total = self.compression.finish(running.ticket, running.gradient, average=True)
                if running.gradient.is_sparse:
                    result = total
                elif total.data_ptr() != running.gradient.data_ptr():
                    running.gradient.copy_(total)
            bucket.future.set_result(result)
        self.steps.finished()


def _gradients(bucket: dist.GradBucket) -> list[Tensor]:
    """As they lie in the bucket: with the strides of their parameters, as of channels_last, where these are dense."""
    buffer = bucket.buffer()
    if buffer.is_sparse:
        return [buffer]
    return [
        gradient.as_strided(parameter.size(), parameter.stride(), gradient.storage_offset())
        if not parameter.is_contiguous() and _is_dense(parameter)
        else gradient
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients())
    ]


def _is_dense(parameter: Tensor) -> bool:
    """Whether its elements fill its memory, in whatever order: a new tensor like it has the same strides then."""
    return torch.empty_like(parameter, device="meta").stride() == parameter.stride()
