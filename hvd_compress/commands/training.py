"""Trains a model by each method as the launcher's users do: under Horovod, by hvd_compress.mpi, or in DDP."""

from __future__ import annotations

import abc
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..gradient_compression import GradientCompression
from ..prediction import PLAIN
from ..transports.base import Transport
from .model_file import Loss

_LEARNING_RATE, _MOMENTUM = 1e-3, 0.9


class Trained:
    """A model of its own, whose gradients are combined by one method: the launcher's own, or a compression."""

    def __init__(
        self, name: str, model: nn.Module, loss: Loss, compression: GradientCompression | None, way: Way
    ) -> None:
        self.name, self.plain, self.compression, self._loss = name, model, compression, loss
        has_momentum = compression is not None and bool(compression.compressor.replaces)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=_LEARNING_RATE, momentum=0.0 if has_momentum else _MOMENTUM)
        self._model, self._optimizer = way.wrapped(self, optimizer)

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """By names that no other method's parameters have: Horovod remembers tensors by theirs."""
        return named(self.name, self.plain)

    def step(self) -> None:
        self._optimizer.zero_grad()
        self._loss(self._model).backward()
        self._optimizer.step()


def named(method: str, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"{method}.{name}", parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class Way(abc.ABC):
    """How gradients are combined; `transport` reaches the same ranks."""

    name: str
    plain: tuple[str, ...] = PLAIN  # methods that it has itself
    transport: Transport

    @abc.abstractmethod
    def wrapped(self, trained: Trained, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The model to compute a loss with, and the optimizer to make steps with."""


class ByHorovod(Way):
    name = "Horovod"

    def __init__(self) -> None:
        import horovod.torch as hvd

        from ..transports.horovod import HorovodTransport

        hvd.init()
        self._hvd, self.transport = hvd, HorovodTransport()

    def wrapped(self, trained: Trained, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        compression = trained.compression or getattr(self._hvd.Compression, trained.name)
        return trained.plain, self._hvd.DistributedOptimizer(optimizer, trained.named, compression=compression)


class ByMPI(Way):
    name, plain = "hvd_compress.mpi", ()

    def __init__(self) -> None:
        from mpi4py import MPI

        from ..transports.mpi import MPITransport

        self.transport = MPITransport(MPI.COMM_WORLD)

    def wrapped(self, trained: Trained, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        from .. import mpi

        assert trained.compression is not None
        return trained.plain, mpi.DistributedOptimizer(optimizer, trained.named, trained.compression)


class ByTorch(Way):
    name = "DistributedDataParallel"

    def __init__(self) -> None:
        from ..transports.torch_distributed import over_gloo

        self.transport = over_gloo()

    def wrapped(self, trained: Trained, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        from .. import ddp

        model = nn.parallel.DistributedDataParallel(trained.plain)
        if trained.compression is not None:
            model.register_comm_hook(trained.compression, ddp.hook)
        elif trained.name == "fp16":
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        return model, optimizer


def way_of(launcher: str | None) -> Way:
    """Raises ValueError where nobody has started several ranks, or what the launcher needs is not there."""
    makers: dict[str | None, list[tuple[str, Callable[[], Way]]]] = {
        "torchrun": [("torch", ByTorch)],
        "horovodrun": [("horovod", ByHorovod)],
        "mpirun": [("horovod", ByHorovod), ("mpi4py", ByMPI)],
    }
    if launcher not in makers:
        raise ValueError("start it by a launcher, as your training: mpirun, horovodrun or torchrun")
    for package, maker in makers[launcher]:
        if _is_there(package):
            return maker()
    raise ValueError(f"started by {launcher}, but {' and '.join(p for p, _ in makers[launcher])} are not installed")


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
