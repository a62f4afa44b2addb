"""Data-parallel training under plain `mpirun`, without Horovod: an optimizer that exchanges compressed gradients."""

from __future__ import annotations

import enum
import functools
import io
import itertools
import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from . import fingerprint
from .binding import NamedParameters
from .compression import Compression
from .facts import Agreement
from .gradient_compression import GradientCompression, say_single_rank
from .gradient_exchange import GradientExchange
from .log import log
from .mpi_optimizer import DistributedMixin
from .ordered_engine import OrderedEngine
from .step_check import advise
from .transports.mpi import CHUNK_BYTES, MPITransport

_GRACE_SECONDS = 1.0  # for the other ranks to print what they have to say before the job is aborted


class Op(enum.Enum):
    """How gradients are combined over the ranks."""

    AVERAGE = "average"
    SUM = "sum"


Average, Sum = Op.AVERAGE, Op.SUM


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters,
    compression: GradientCompression = Compression.none,
    comm: MPI.Comm = MPI.COMM_WORLD,
    *,
    op: Op = Average,
    backward_passes_per_step: int = 1,
) -> Any:
    """Wrap `optimizer` so that `step()` applies the gradients combined over all ranks of `comm`.

    Collective over `comm`. The result is an optimizer of the same class, sharing state and parameter groups with
    `optimizer`, with `synchronize()` and `skip_synchronize()` besides. Gradients travel while backward still runs if
    MPI provides MPI_THREAD_MULTIPLE, else in `synchronize()`.

    named_parameters: (name, parameter) pairs of at least all parameters of the optimizer.
    compression: bound to these parameters, or one of `Compression.none`, `fp16` and `bf16`.
    op: Average or Sum.
    backward_passes_per_step: backward passes that accumulate before gradients are exchanged.

    Raises ValueError for arguments that cannot work, MismatchError on every rank when the ranks differ in them.
    """
    if backward_passes_per_step < 1:
        raise ValueError(f"backward_passes_per_step must be at least 1: {backward_passes_per_step}")
    if not isinstance(op, Op):
        raise ValueError(f"op must be hvd_compress.mpi.Average or Sum: {op!r}")
    if not isinstance(compression, GradientCompression):
        raise ValueError(f"compression must come from hvd_compress.Compression: {compression!r}")
    named_parameters = list(named_parameters)
    if not compression.bound:
        compression = compression(named_parameters)
    if isinstance(optimizer, DistributedMixin):
        raise ValueError(f"this {type(optimizer).__name__} is distributed already")
    cls: Any = type(type(optimizer).__name__, (DistributedMixin, type(optimizer)), {})
    wrapped = cls.__new__(cls)
    wrapped._distribute(optimizer, compression)
    _attach(compression, wrapped, comm)
    # Its own duplicate, and the main thread's: the engine's collectives run in another thread.
    agreement = Agreement(MPITransport(comm))
    weakref.finalize(wrapped, agreement.transport.leave)
    wrapped._start(
        GradientExchange(compression, agreement, average=op is Average, backward_passes=backward_passes_per_step)
    )
    return wrapped


def _attach(compression: GradientCompression, optimizer: torch.optim.Optimizer, comm: MPI.Comm) -> None:
    transport = MPITransport(comm)
    threaded = MPI.Query_thread() == MPI.THREAD_MULTIPLE
    if not threaded and transport.size > 1 and transport.rank == 0:
        log.warning("MPI provides no MPI_THREAD_MULTIPLE: gradients are exchanged after backward, not during it")
    if transport.size == 1:
        say_single_rank(compression.compressor)
    compression.unregister()
    conflict = compression.compressor.conflict(optimizer) if transport.size > 1 else None
    fingerprint.check(transport, "hvd_compress.check", {"0": compression.description() | {"conflict": conflict}})
    if conflict:
        raise ValueError(conflict)
    if transport.size > 1:
        advise(optimizer, compression.compressor, transport.rank)
    compression.attach(transport, functools.partial(OrderedEngine, threaded=threaded and transport.size > 1))


def broadcast_parameters(
    parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    root_rank: int = 0,
    comm: MPI.Comm = MPI.COMM_WORLD,
) -> None:
    """Overwrite the tensors of all ranks by those of `root_rank`; `model.state_dict()` or `named_parameters()`.

    Raises ValueError, on every rank, when names, shapes or dtypes differ from those of the root.
    """
    pairs = list(parameters.items() if isinstance(parameters, Mapping) else parameters)
    mine = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in pairs]
    roots = comm.bcast(mine, root_rank)
    difference = next(((a, b) for a, b in itertools.zip_longest(roots, mine) if a != b), None)
    for rank, found in enumerate(comm.allgather(difference)):
        if found:
            raise ValueError(
                f"rank {root_rank} has {found[0]}, rank {rank} has {found[1]}: build the same model on both"
            )
    for _, tensor in pairs:
        buffer = tensor.detach().cpu().contiguous()
        _broadcast_bytes(buffer.view(-1).view(torch.uint8).numpy(), root_rank, comm)
        if comm.rank != root_rank:
            tensor.detach().copy_(buffer)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, comm: MPI.Comm = MPI.COMM_WORLD
) -> None:
    """Give every rank the `state_dict()` of the optimizer of `root_rank`."""
    buffer = io.BytesIO()
    if comm.rank == root_rank:
        torch.save(optimizer.state_dict(), buffer)
    data = np.frombuffer(bytearray(buffer.getvalue()), dtype=np.uint8)
    length = comm.bcast(data.size, root_rank)
    if comm.rank != root_rank:
        data = np.empty(length, dtype=np.uint8)
    _broadcast_bytes(data, root_rank, comm)
    if comm.rank != root_rank:
        optimizer.load_state_dict(torch.load(io.BytesIO(data.tobytes()), weights_only=True))


def _broadcast_bytes(array: np.ndarray, root: int, comm: MPI.Comm) -> None:
    for start in range(0, array.size, CHUNK_BYTES):
        comm.Bcast(array[start : start + CHUNK_BYTES], root)


def _abort_on_exception() -> None:
    """Let an uncaught exception end the job: the other ranks would wait for this one for ever."""
    previous = sys.excepthook

    def hook(*exception: Any) -> None:
        previous(*exception)
        sys.stderr.flush()
        time.sleep(_GRACE_SECONDS)
        MPI.COMM_WORLD.Abort(1)

    if MPI.COMM_WORLD.size > 1:
        sys.excepthook = hook


# At import, against our habit: a rank can fail long before it makes an optimizer, and the others wait for it there.
_abort_on_exception()
