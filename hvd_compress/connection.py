"""Which transport reaches the other ranks: what the script has started, or what it says."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist

from .transports.base import Transport

_BY = "hvd.init(), torch.distributed.init_process_group() or import hvd_compress.mpi"


def connect(over: Any = None) -> Transport:
    """A transport over `over`: an mpi4py communicator, a torch.distributed process group, a Horovod process set or a
    Transport; None for all ranks of the one of these that the script has started.

    Raises ValueError where None could mean several, or nothing is started.
    """
    if isinstance(over, Transport):
        return over
    hvd, mpi = sys.modules.get("horovod.torch"), sys.modules.get("mpi4py.MPI")
    if over is None:
        started = {"Horovod": hvd is not None and hvd.is_initialized(), "torch.distributed": _has_group()}
        if not any(started.values()):
            started["MPI"] = mpi is not None and mpi.Is_initialized()
        names = [name for name, is_started in started.items() if is_started]
        if len(names) != 1:
            what = "nothing connects the ranks" if not names else f"{' and '.join(names)} both connect ranks"
            raise ValueError(f"{what}. Remedy: {_remedy(names)}")
        kind = names[0]
    elif mpi is not None and isinstance(over, mpi.Comm):
        kind = "MPI"
    elif hvd is not None and isinstance(over, hvd.ProcessSet):
        kind = "Horovod"
    elif dist.is_available() and isinstance(over, dist.ProcessGroup):
        kind = "torch.distributed"
    else:
        raise ValueError(f"over must be a communicator, a process group, a process set or None: {over!r}")
    return _transport(kind, over, mpi)


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _remedy(names: list[str]) -> str:
    if not names:
        return f"call {_BY} before"
    return "give over=hvd.global_process_set or over=torch.distributed.group.WORLD"


def _transport(kind: str, over: Any, mpi: Any) -> Transport:
    if kind == "Horovod":
        from .transports.horovod import HorovodTransport

        return HorovodTransport(over)
    if kind == "torch.distributed":
        from .transports.torch_distributed import TorchTransport

        return TorchTransport(over)
    from .transports.mpi import MPITransport

    return MPITransport(mpi.COMM_WORLD if over is None else over)
