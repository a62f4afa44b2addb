"""A torch.distributed process group as a transport. Collectives are matched by their order, as MPI's are.

Tried on Gloo alone. NCCL carries tensors of a GPU only: frames are moved there and back. Where there are two GPUs,
`torchrun --standalone --nproc-per-node 2 mpi_tests/jobs/scripts/ddp_device.py cuda` tries that in a minute.
"""

from __future__ import annotations

import atexit
import contextlib
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..requests import ReduceOp
from .base import Pending, WatchedPending
from .rooms import RoomTransport
from .torch_groups import lease

_LEAVERS = "leavers"  # in the store: how many ranks take part no longer

_OPS = {ReduceOp.SUM: dist.ReduceOp.SUM, ReduceOp.MAX: dist.ReduceOp.MAX, ReduceOp.MIN: dist.ReduceOp.MIN}


class _WorkPending(WatchedPending):
    """A collective under way; holds its buffers until it is done."""

    def __init__(
        self, transport: TorchTransport, work: Any, answer: Callable[[], Any], buffers: object, number: int | None
    ) -> None:
        super().__init__(transport, number)
        self._explained, self._work, self._answer, self._buffers = transport.explained, work, answer, buffers

    def done(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self) -> Any:
        self.await_ready()
        with self._explained():
            self._work.wait()
        self._buffers = None
        return self._answer()


class TorchTransport(RoomTransport):
    """The ranks of `process_group`, None for all, in a group of its own: the program's traffic cannot be mistaken for
    this. Collective over these ranks.

    Raises RuntimeError where torch.distributed is not initialized, and on a rank that is not in the group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialized: call torch.distributed.init_process_group() before the model is "
                "wrapped, and destroy_process_group() after its last backward pass"
            )
        if dist.get_rank(process_group) < 0:
            raise RuntimeError(
                f"rank {dist.get_rank()} is not in the process group of this compression: give it the one that "
                "DistributedDataParallel was given"
            )
        self._world = dist.group.WORLD
        config = str(dist.get_backend_config(process_group))
        ranks = dist.get_process_group_ranks(process_group)
        self._device = _device(config)
        self._lease = lease(ranks, config, self._device)
        weakref.finalize(self, self._lease.end)  # what is under way holds this transport
        self.group, self._followers = self._lease.groups
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._gone = False
        self._store: dist.Store | None = None
        # A name of its own: torchrun may keep the store, with all that is in it, when it restarts the ranks.
        name = self.broadcast("", torch.tensor([uuid.uuid4().int >> 65]), 0)
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"hvd_compress/{int(name.wait())}", store)

    def allreduce(self, name: str, tensor: Tensor, op: ReduceOp) -> Pending:
        reduced = tensor.to(self._device)  # in place: fused tensors are copies already
        return self._post(
            lambda: dist.all_reduce(reduced, _OPS[op], self.group, async_op=True),
            lambda: reduced.to(tensor.device),
            reduced,
        )

    def broadcast(self, name: str, tensor: Tensor, root: int) -> Pending:
        received = tensor.to(self._device).contiguous()
        source = self._global(root)
        return self._post(
            lambda: dist.broadcast(received, source, self.group, async_op=True),
            lambda: received.to(tensor.device),
            received,
        )

    @property
    def most_gathered_bytes(self) -> float:
        return float("inf") if self._device.type == "cpu" else 0  # untried on NCCL

    def gather_rows(self, row: Tensor) -> Pending:
        """The same row to everyone: Gloo's allgather of large messages takes several times as long as this."""
        return self.exchange_rows(row.repeat(self.size, 1))

    def exchange_rows(self, rows: Tensor) -> Pending:
        sent = rows.to(self._device)
        received = torch.empty_like(sent)
        return self._post(
            lambda: dist.all_to_all_single(received, sent, group=self.group, async_op=True), received.cpu, sent
        )

    def follow(self, outgoing: Tensor, sizes: list[int], lengths: list[int], number: int) -> Pending:
        sent = outgoing.reshape(-1).contiguous().to(self._device)
        received = torch.empty(sum(lengths), dtype=torch.uint8, device=self._device)
        return self._post(
            lambda: dist.all_to_all_single(received, sent, lengths, sizes, self._followers, async_op=True),
            lambda: list(received.cpu().split(lengths)),
            sent,
            number,
        )

    def _global(self, peer: int) -> int:
        return dist.get_global_rank(self.group, peer)

    def is_current(self) -> bool:
        return dist.is_initialized() and dist.group.WORLD is self._world

    def leave(self) -> None:
        self._gone = True
        if self._store is None or not self.is_current():
            return
        with contextlib.suppress(RuntimeError):  # the store may have ended with the rank that held it
            self._store.set(str(self.rank), str(self.posted))
            self._store.add(_LEAVERS, 1)

    def abort(self) -> None:
        """Nothing: what is left behind is a thread that only looks, and ends with the process."""

    def check_peers(self, number: int) -> None:
        """Raise RuntimeError if this rank, or another before the collective of this number, has left."""
        if self._gone:
            raise RuntimeError(f"rank {self.rank} waits for a collective no longer: its compression was detached")
        if (store := self._store) is None:
            return
        with self.explained():
            count = store.add(_LEAVERS, 0)
            left = {rank: int(store.get(str(rank))) for rank in range(self.size) if count and store.check([str(rank)])}
        for rank, last in left.items():
            if last < number:
                raise RuntimeError(
                    f"rank {rank} has ended its training, or its program, while rank {self.rank} still exchanges "
                    "gradients. Give every rank the same number of batches (drop or repeat the last ones), or train "
                    "inside torch.distributed.algorithms.Join([model])."
                )

    @contextlib.contextmanager
    def explained(self) -> Any:
        """Say what an error of torch.distributed means."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RuntimeError(
                f"rank {self.rank} of {self.size} cannot exchange gradients any more: another rank has failed or "
                f"ended, or the network has. Look for the first error that any rank printed. ({reason})"
            ) from error

    def _post(
        self, start: Callable[[], Any], answer: Callable[[], Any], buffers: object, number: int | None = None
    ) -> Pending:
        with self.explained():
            work = self._lease.started(start())
        return _WorkPending(self, work, answer, buffers, number)


def _device(config: str) -> torch.device:
    """Where a group's tensors must be, such as for "cpu:gloo,cuda:nccl": on the CPU if it carries these."""
    backends = dict(pair.split(":") for pair in config.split(",") if ":" in pair)
    kind = "cpu" if backends.get("cpu", "nccl") != "nccl" else next(d for d in backends if d != "cpu")
    return torch.device(kind, getattr(torch, kind).current_device()) if kind != "cpu" else torch.device("cpu")


def over_gloo() -> TorchTransport:
    """All that the launcher has started, on Gloo; to be called once.

    The group is destroyed before Python ends: a thread of Gloo's that still lets go of what the last collective has
    moved then would abort the process (seen with torch 2.13).
    """
    dist.init_process_group("gloo")
    atexit.register(dist.destroy_process_group)
    return TorchTransport()
