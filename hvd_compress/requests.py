"""What an exchange may ask for. A transport answers with a tensor, or with one frame per rank in rank order.

A request says whether it is the `last` of its exchange. Its answer may then be taken at any time, since nothing is
posted after it; that of any other only where all ranks take it, see paced_engine.py.
"""

from __future__ import annotations

import enum
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Union

from torch import Tensor


class ReduceOp(enum.Enum):
    SUM = "sum"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True)
class Allreduce:
    """Answer: the elementwise reduction of `tensor` over all ranks, same shape and dtype."""

    tensor: Tensor
    op: ReduceOp = ReduceOp.SUM
    last: bool = False


@dataclass(frozen=True)
class Allgather:
    """Answer: every rank's frame, in rank order. Lengths may differ by rank."""

    frame: Tensor  # uint8 [bytes], as made by wire.pack
    last: bool = False


@dataclass(frozen=True)
class Broadcast:
    """Answer: the `tensor` of rank `root`; the others pass one of the same shape and dtype."""

    tensor: Tensor
    root: int
    last: bool = False


@dataclass(frozen=True)
class Alltoall:
    """Answer: the frames addressed to this rank, in rank order of their senders."""

    frames: Sequence[Tensor]  # one uint8 frame per destination rank
    last: bool = False


Request = Union[Allreduce, Allgather, Broadcast, Alltoall]

# The whole communication of one gradient: yields requests, receives their answers, returns the sum over ranks as
# float32 [numel], or None when the gradient of any rank is not finite.
Exchange = Generator[Request, Any, Union[Tensor, None]]


def sent_bytes(request: Request) -> int:
    """Bytes that this rank hands to the network for `request`.

    An Allreduce or a Broadcast counts its tensor once, on every rank alike: what they really move depends on how they
    are done, and a broadcast passes through most ranks on its way.
    """
    if isinstance(request, Allgather):
        return request.frame.numel()
    if isinstance(request, Alltoall):
        return sum(frame.numel() for frame in request.frames)
    return request.tensor.numel() * request.tensor.element_size()
