"""One face for the backends, so that one test serves all: Horovod on MPI or Gloo, and mpi4py."""

from __future__ import annotations

import abc
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_compress.transports.base import Transport

_SLEEP_SECONDS = 1e-3
NamedParameters = Iterable[tuple[str, Tensor]]


@dataclass
class Subset:
    """Some of the ranks, which train by themselves."""

    rank: int  # among them
    size: int
    of_compression: dict[str, Any] = field(default_factory=dict)
    of_optimizer: dict[str, Any] = field(default_factory=dict)


class Job(abc.ABC):
    """The job that this process is a rank of."""

    backend: str
    rank: int
    size: int
    is_horovod: bool

    def barrier(self) -> None:
        self.allgather(None)

    @abc.abstractmethod
    def allgather(self, value: Any) -> list[Any]:
        """Every rank's picklable value."""

    @abc.abstractmethod
    def distribute(
        self, optimizer: torch.optim.Optimizer, named_parameters: NamedParameters, compression: Any, **options: Any
    ) -> Any:
        """The backend's DistributedOptimizer; op="average" or "sum". Skips the test if it lacks an option."""

    @abc.abstractmethod
    def transport(self) -> Transport:
        """A transport over all ranks."""

    @abc.abstractmethod
    def split(self, members: Sequence[Sequence[int]]) -> Subset:
        """Cut the ranks into disjoint sets; returns that of this rank."""


class HorovodJob(Job):
    is_horovod = True

    def __init__(self, backend: str) -> None:
        os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
        import horovod.torch as hvd

        hvd.init()
        _wait_without_spinning(hvd)
        if hvd.size() > 1:
            assert hvd.mpi_enabled() == (backend == "horovod-mpi"), f"Horovod does not run on what {backend} names"
        self.backend, self.rank, self.size = backend, hvd.rank(), hvd.size()
        self.hvd = hvd
        self._sets: dict[tuple[int, ...], Any] = {}  # Horovod refuses to make one twice

    def allgather(self, value: Any) -> list[Any]:
        return self.hvd.allgather_object(value)

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: NamedParameters,
        compression: Any,
        *,
        op: str = "average",
        **options: Any,
    ) -> Any:
        options["op"] = {"average": self.hvd.Average, "sum": self.hvd.Sum, "adasum": self.hvd.Adasum}[op]
        return self.hvd.DistributedOptimizer(
            optimizer, named_parameters=named_parameters, compression=compression, **options
        )

    def transport(self) -> Transport:
        from hvd_compress.transports.horovod import HorovodTransport

        return HorovodTransport()

    def split(self, members: Sequence[Sequence[int]]) -> Subset:
        for ranks in map(tuple, members):
            if ranks not in self._sets:
                self._sets[ranks] = self.hvd.add_process_set(ranks)
        mine = next(self._sets[ranks] for ranks in map(tuple, members) if self.rank in ranks)
        return Subset(mine.rank(), mine.size(), {"process_set": mine}, {"process_set": mine})


def _wait_without_spinning(hvd: Any) -> None:
    """Let a rank that waits sleep between looks: Horovod's own wait spins, which keeps the cores from the ranks that
    it waits for where these outnumber them. What is waited for, and what comes of it, is the same."""
    from horovod.torch import functions, mpi_ops, optimizer

    spinning = mpi_ops.synchronize

    def synchronize(handle: Any) -> Any:
        while not mpi_ops.poll(handle):
            time.sleep(_SLEEP_SECONDS)
        return spinning(handle)

    for module in (hvd, mpi_ops, optimizer, functions):
        if getattr(module, "synchronize", None) is spinning:
            module.synchronize = synchronize


class MPIJob(Job):
    backend = "mpi4py"
    is_horovod = False

    def __init__(self) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD.Dup()  # apart from the traffic of the tests
        self.rank, self.size = self.comm.rank, self.comm.size

    def allgather(self, value: Any) -> list[Any]:
        return self.comm.allgather(value)

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: NamedParameters,
        compression: Any,
        *,
        op: str = "average",
        **options: Any,
    ) -> Any:
        from hvd_compress import mpi

        for lacking in ("groups", "gradient_predivide_factor"):
            if lacking in options:
                pytest.skip(f"hvd_compress.mpi has no {lacking}=, as it has its own buckets")
        options["op"] = {"average": mpi.Average, "sum": mpi.Sum}[op]
        return mpi.DistributedOptimizer(optimizer, named_parameters, compression, **options)

    def transport(self) -> Transport:
        from hvd_compress.transports.mpi import MPITransport

        return MPITransport(self.comm)

    def split(self, members: Sequence[Sequence[int]]) -> Subset:
        colour = next(number for number, ranks in enumerate(members) if self.rank in ranks)
        comm = self.comm.Split(colour, self.rank)
        return Subset(comm.rank, comm.size, {}, {"comm": comm})


def join(backend: str) -> Job:
    """Become a rank of the job that this process was launched for."""
    return MPIJob() if backend == "mpi4py" else HorovodJob(backend)
