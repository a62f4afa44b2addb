"""What this rank has posted and not all ranks have: it would match an operation of a later test, or end hvd.join()."""

from __future__ import annotations

import time

from .job import Job

_POLL_SECONDS = 0.001


def left_over(job: Job, patience_seconds: float) -> list[str]:
    """The operations of this process that do not end within `patience_seconds`; what all ranks posted ends before."""
    if not job.is_horovod:
        return []  # each transport has a communicator of its own, whose operations match no others
    deadline = time.monotonic() + patience_seconds
    while (names := _outstanding()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return names


def _outstanding() -> list[str]:
    """Posted and not completed: ours by their names, and whatever else Horovod holds."""
    import horovod.torch as hvd
    from horovod.torch import mpi_ops

    from hvd_compress.transports import horovod as transport

    names: list[str] = getattr(transport, "outstanding", list)()
    for handle, (tensor, *_) in list(mpi_ops._handle_map.items()):
        if not hvd.poll(handle) and not names:
            names.append(f"one of shape {tuple(getattr(tensor, 'shape', ()))}")
    return names
