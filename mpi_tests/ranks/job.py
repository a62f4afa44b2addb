"""One face for the backends, so that one test serves all: Horovod on MPI or Gloo, mpi4py, and torch.distributed."""

from __future__ import annotations

import abc
import atexit
import contextlib
import functools
import os
import time
import weakref
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


class TorchJob(Job):
    """torch.distributed on Gloo, without Horovod and mpi4py."""

    backend = "torch"
    is_horovod = False

    def __init__(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
        self.dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def allgather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self.dist.all_gather_object(values, value)
        return values

    def distribute(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: NamedParameters,
        compression: Any,
        *,
        op: str = "average",
        process_group: Any = None,
        **options: Any,
    ) -> Any:
        """The optimizer itself, its parameters in a DistributedDataParallel whose hook combines their gradients."""
        from hvd_compress import ddp

        if options or op != "average":
            pytest.skip(f"DistributedDataParallel has no {', '.join(options) or f'op={op}'}")
        named_parameters = list(named_parameters)
        if not compression.bound:
            compression = compression(named_parameters)
        model = _wrap(optimizer, process_group)
        ddp.attach(compression, process_group)
        model.register_comm_hook(compression, ddp.hook)
        return optimizer

    def transport(self) -> Transport:
        from hvd_compress.transports.torch_distributed import TorchTransport

        return TorchTransport()

    def split(self, members: Sequence[Sequence[int]]) -> Subset:
        groups = [self.dist.new_group(list(ranks)) for ranks in members]
        mine = next(group for group, ranks in zip(groups, members) if self.rank in ranks)
        return Subset(self.dist.get_rank(mine), self.dist.get_world_size(mine), {}, {"process_group": mine})


def _wrap(optimizer: Any, process_group: Any) -> torch.nn.Module:
    """Put an optimizer's parameters into a DistributedDataParallel, which waits for gradients anew after zero_grad().

    It does so in its forward pass, and these tests, whose losses are made of the parameters, have no other.
    """
    from torch.nn.parallel import DistributedDataParallel

    module = torch.nn.Module()
    module.parts = torch.nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
    module.forward = lambda: None
    model = DistributedDataParallel(module, process_group=process_group, bucket_cap_mb=1e-3)
    model()
    optimizer.zero_grad = functools.partial(_zero_grad, weakref.ref(optimizer), model)
    optimizer.synchronize = lambda: None  # gradients are combined when backward() returns
    optimizer.skip_synchronize = contextlib.nullcontext
    return model


def _zero_grad(of: weakref.ref[Any], model: torch.nn.Module, *arguments: Any) -> None:
    optimizer = of()
    assert optimizer is not None
    type(optimizer).zero_grad(optimizer, *arguments)
    model()


def join(backend: str) -> Job:
    """Become a rank of the job that this process was launched for."""
    return {"mpi4py": MPIJob, "torch": TorchJob}[backend]() if backend in ("mpi4py", "torch") else HorovodJob(backend)
