"""What an exchange may ask for. A transport answers with a tensor, or with one frame per rank in rank order.

A request says whether it is the `last` of its exchange. Its answer may then be taken at any time, since nothing is
posted after it; that of any other only where all ranks take it, see paced_engine.py.
"""

from __future__ import annotations

import enum
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Union

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


@dataclass(frozen=True)
class AllgatherParts:
    """As Allgather, of many gradients at once. Answer: for every rank the concatenation of its parts, uint8 [bytes]."""

    parts: Sequence[Tensor]  # uint8, at least one
    shares: Sequence[int]  # bytes that count as those of each gradient
    last: bool = False


@dataclass(frozen=True)
class AlltoallParts:
    """As Alltoall, of many gradients at once. Answer: from every rank the concatenation of what it addressed to this
    one, uint8 [bytes]."""

    parts: Sequence[Sequence[Tensor]]  # by destination rank; what a rank addresses to itself may be left out
    shares: Sequence[int]  # bytes that count as those of each gradient
    last: bool = False


Request = Union[Allreduce, Allgather, Broadcast, Alltoall, AllgatherParts, AlltoallParts]


class Total(NamedTuple):
    """What comes of the exchange of a gradient: the sum over the ranks, the same bits on all of them."""

    values: Tensor  # float32 [numel], or of the gradient's own type where that is wider or sparse
    divisor: float = 1.0  # by which the sum is divided already
    bound: float | None = None  # of all |values|, finite exactly if they are; None where nobody has looked


# The whole communication of one gradient: yields requests, receives their answers, returns a Total, or None when the
# gradient of any rank is not finite. What is exchanged besides gradients may return anything.
Exchange = Generator[Request, Any, Any]
# The same for several gradients; returns a Total, or None, for each.
GroupExchange = Generator[Request, Any, Sequence[Union[Total, None]]]


class Topology(Protocol):
    """Who sends what to whom, for gradients that travel together. Equal ones are taken for the same."""

    def reduce(self, parts: Sequence[Any]) -> GroupExchange:
        """Exchange these; every rank gives the same ones, in the same order."""


@dataclass(frozen=True)
class Member:
    """A gradient that is exchanged together with the others of its bucket that have an equal topology."""

    topology: Topology
    part: Any


def sent_bytes(request: Request) -> int:
    """Bytes that this rank hands to the network for `request`.

    An Allreduce or a Broadcast counts its tensor once, on every rank alike: what they really move depends on how they
    are done, and a broadcast passes through most ranks on its way.
    """
    if isinstance(request, (AllgatherParts, AlltoallParts)):
        return sum(request.shares)
    if isinstance(request, Allgather):
        return request.frame.numel()
    if isinstance(request, Alltoall):
        return sum(frame.numel() for frame in request.frames)
    return request.tensor.numel() * request.tensor.element_size()
