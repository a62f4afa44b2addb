"""What the scripts share: one way to train on whichever of Horovod and MPI the first argument names."""

from __future__ import annotations

import hashlib
import sys
import time
from typing import Any

from mpi_tests import no_compiler

no_compiler.install()

import torch  # noqa: E402

torch.set_num_threads(1)
KIND = sys.argv[1]
ARGUMENTS = sys.argv[2:]

if KIND == "horovod":
    import horovod.torch as hvd

    hvd.init()
    RANK, SIZE = hvd.rank(), hvd.size()
else:
    from mpi4py import MPI

    from hvd_compress import mpi

    RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size


def start() -> None:
    """Say when this rank has its imports behind it."""
    print(f"training starts at {time.time():.3f}", flush=True)


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))


def distribute(optimizer: torch.optim.Optimizer, named_parameters: Any, compression: Any, **options: Any) -> Any:
    """The distributed optimizer of the backend."""
    if KIND == "horovod":
        return hvd.DistributedOptimizer(
            optimizer, named_parameters=named_parameters, compression=compression, **options
        )
    return mpi.DistributedOptimizer(optimizer, named_parameters, compression, **options)


def sgd(model: torch.nn.Module, compression: Any, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return distribute(optimizer, list(model.named_parameters()), compression, **options)


def step(model: torch.nn.Module, optimizer: Any, generator: torch.Generator) -> float:
    """One step on this rank's own random batch."""
    dtype = next(model.parameters()).dtype
    batch = torch.randn(8, next(model.parameters()).shape[1], generator=generator).to(dtype)
    optimizer.zero_grad()
    loss = model(batch).pow(2).mean()
    loss.backward()
    optimizer.step()
    return float(loss)


def own_batches() -> torch.Generator:
    return torch.Generator().manual_seed(100 + RANK)


def digest(model: torch.nn.Module) -> str:
    """A hash of all parameters' bits."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:16]
