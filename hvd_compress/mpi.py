"""Data-parallel training under plain `mpirun`, without Horovod: an optimizer that exchanges compressed gradients."""

from __future__ import annotations

import enum
import functools
import io
import itertools
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from . import fingerprint
from .binding import NamedParameters
from .compression import Compression
from .engine import Ticket
from .gradient_compression import GradientCompression, say_single_rank
from .log import log
from .ordered_engine import OrderedEngine
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
    cls: Any = type(type(optimizer).__name__, (_DistributedMixin, type(optimizer)), {})
    wrapped = cls.__new__(cls)
    # A scheduler may have wrapped the instance's step(), around the step that does not synchronize.
    wrapped.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    wrapped._distribute(compression, comm, op, backward_passes_per_step)
    return wrapped


class _DistributedMixin(torch.optim.Optimizer):
    """What DistributedOptimizer adds to the class of an optimizer."""

    def _distribute(self, compression: GradientCompression, comm: MPI.Comm, op: Op, backward_passes: int) -> None:
        self.compression = compression
        self._op = op
        self._backward_passes = backward_passes
        self._index_of = {id(parameter): index for index, parameter in enumerate(compression.parameters)}
        self._passes: dict[int, int] = {}  # by index: backward passes since the last synchronization
        self._tickets: dict[int, Ticket] = {}
        self._sparse: set[int] = set()
        self._hooks: dict[int, Any] = {}
        self._synchronized = False
        self._should_synchronize = True
        for group in self.param_groups:
            self._check_named(group)
        transport = MPITransport(comm)
        threaded = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        if not threaded and transport.size > 1 and transport.rank == 0:
            log.warning("MPI provides no MPI_THREAD_MULTIPLE: gradients are exchanged after backward, not during it")
        if transport.size == 1:
            say_single_rank(compression.compressor)
        compression.delist()
        conflict = compression.compressor.conflict(self) if transport.size > 1 else None
        fingerprint.check(transport, "hvd_compress.check", {"0": compression.description() | {"conflict": conflict}})
        if conflict:
            raise ValueError(conflict)
        compression.attach(transport, functools.partial(OrderedEngine, threaded=threaded and transport.size > 1))
        compression.say_if_more_than_dense()
        self._add_hooks()

    def _check_named(self, group: Mapping[str, Any]) -> None:
        for parameter in group["params"]:
            if id(parameter) not in self._index_of:
                raise ValueError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not in the "
                    "named_parameters of its compression: pass all of model.named_parameters()"
                )

    def _add_hooks(self) -> None:
        """Watch all parameters that are trained; those unfrozen later are found at the next synchronization."""
        for index, parameter in self._trained():
            if index not in self._hooks:
                hook = _Hook(weakref.ref(self), index)
                self._hooks[index] = parameter.register_post_accumulate_grad_hook(hook)

    def _trained(self) -> Iterator[tuple[int, Tensor]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield self._index_of[id(parameter)], parameter

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        self._passes[index] = self._passes.get(index, 0) + 1
        if self._passes[index] > self._backward_passes:
            raise RuntimeError(
                f"parameter {self.compression.slots[index].name!r} got a gradient more than "
                f"backward_passes_per_step={self._backward_passes} times before step() or synchronize()"
            )
        if self._passes[index] == self._backward_passes:
            self._submit(index, parameter)

    def _submit(self, index: int, parameter: Tensor) -> None:
        if parameter.grad is None:  # of another rank's batch it may not be
            layout = torch.sparse_coo if index in self._sparse else torch.strided
            parameter.grad = torch.zeros_like(parameter, layout=layout)
        if parameter.grad.is_sparse:
            self._sparse.add(index)
        if self.compression.size > 1:
            self._tickets[index] = self.compression.submit(index, parameter.grad, in_place=True)

    def synchronize(self) -> None:
        """Finish combining gradients over the ranks; afterwards every `p.grad` is the combined one."""
        self._add_hooks()
        trained = dict(self._trained())
        for index in sorted(trained):
            if index not in self._tickets and self.compression.size > 1:
                self._submit(index, trained[index])
        for index, ticket in self._tickets.items():
            parameter = self.compression.parameters[index]
            assert parameter.grad is not None
            parameter.grad = self.compression.finish(ticket, parameter.grad, average=self._op is Average)
        self._tickets.clear()
        self._passes.clear()
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Generator[None, None, None]:
        """For a `step()` after `synchronize()`: it is not to synchronize again."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine gradients over the ranks, unless skip_synchronize() says they are, and apply them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn(
                    "step() synchronizes again after synchronize(): call it inside optimizer.skip_synchronize()",
                    stacklevel=2,
                )
            self.synchronize()
        self._synchronized = False
        super().step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._tickets:
            raise RuntimeError("zero_grad() came after backward() but before step() or synchronize(): call those first")
        self._passes.clear()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._check_named(self.param_groups[-1])
        self._add_hooks()


class _Hook:
    """Hands a ready gradient to the optimizer, as long as there is one."""

    def __init__(self, optimizer: weakref.ref[_DistributedMixin], index: int) -> None:
        self._optimizer, self._index = optimizer, index

    def __call__(self, parameter: Tensor) -> None:
        if (optimizer := self._optimizer()) is not None:
            optimizer._on_gradient(self._index, parameter)


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
