"""The contract of every algorithm: how one rank's gradient becomes requests, and the answers a sum over the ranks."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import ErrorFeedback
from ..requests import Allgather, Allreduce, Exchange, Request


@dataclass
class Slot:
    """One parameter's place in the exchange, as an algorithm sees it."""

    name: str
    index: int  # in the bound order, the same on every rank
    shape: torch.Size
    rank: int = 0
    size: int = 1
    step: int = 0  # exchanges finished so far, the same on every rank
    seed: int = 0
    memory: ErrorFeedback = field(default_factory=ErrorFeedback)


class Compressor(abc.ABC):
    """An algorithm with its options: a frozen dataclass, hence comparable, hashable and printable.

    It holds no state: residuals are in the slot's memory, random numbers come from (seed, parameter, step, rank).
    """

    algorithm: ClassVar[int]  # id in the frames; never reused
    stateful: ClassVar[bool] = False  # whether it keeps residuals in the slot's memory

    @abc.abstractmethod
    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        """Exchange `gradient`, of any floating dtype and shape, which stays as it is; see requests.Exchange."""

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


class SummedCompressor(Compressor):
    """An algorithm whose whole exchange is one SUM of a type that Horovod and MPI can add: no frames, no carrier."""

    @abc.abstractmethod
    def summand(self, gradient: Tensor) -> Tensor:
        """What is added up over the ranks in place of `gradient`."""

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        total: Tensor = yield Allreduce(self.summand(gradient))
        return total.to(torch.float32 if gradient.dtype != torch.float64 else torch.float64).reshape(-1)


class SparsifyingCompressor(Compressor):
    """An algorithm with error feedback that sends some values at some positions of what has accumulated."""

    stateful = True

    @abc.abstractmethod
    def encode(self, slot: Slot, accumulated: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Payload, uint8; positions sent, int64 [n]; the values that receivers will see there, float32 [n].

        `accumulated` (residual + gradient) and `gradient`: float32 [numel], finite.
        """

    @abc.abstractmethod
    def decode(self, frame: wire.Frame) -> Tensor:
        """float32 [numel]. Raises ValueError for a payload that does not fit."""

    @abc.abstractmethod
    def rate(self, slot: Slot) -> float:
        """What the frame's header says of the density or the like."""

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        values = flat32(gradient)
        accumulated = slot.memory.compensate(slot.name, values)
        payload, flags = None, 0
        if max_abs(accumulated) < math.inf:
            payload, positions, sent = self.encode(slot, accumulated, values)
            if fits(payload, gradient):
                accumulated[positions] -= sent
            else:
                payload, sent = encode_dense(accumulated, gradient.dtype)
                accumulated, flags = accumulated - sent, wire.DENSE
            if max_abs(sent) < math.inf:
                slot.memory.propose(slot.name, accumulated)
            else:  # too large for the gradient's own type
                payload = None
        return (yield from gather_sum(self, slot, gradient, payload, self.decode, rate=self.rate(slot), flags=flags))


def flat32(gradient: Tensor) -> Tensor:
    """`gradient` as float32 [numel], without a copy where it already is."""
    return gradient.detach().reshape(-1).to(torch.float32)


def flat(gradient: Tensor) -> Tensor:
    """`gradient` as [numel] in a type that the kernels read: as it is where it can be, float64 as float32."""
    values = gradient.detach().reshape(-1)
    return values if values.dtype in (torch.float32, torch.float16, torch.bfloat16) else values.to(torch.float32)


def max_abs(values: Tensor) -> float:
    """Largest |value|; infinity when any is not finite, 0 for an empty tensor."""
    if values.numel() == 0:
        return 0.0
    largest = float(values.abs().max())
    return largest if largest == largest else math.inf


def gather_sum(
    compressor: Compressor,
    slot: Slot,
    gradient: Tensor,
    payload: Tensor | None,
    decode: Callable[[wire.Frame], Tensor] | None = None,
    *,
    add: Callable[[Sequence[Tensor], Tensor], object] | None = None,
    rate: float = 0.0,
    flags: int = 0,
) -> Generator[Request, Any, Tensor | None]:
    """Gather every rank's payload and add the decoded tensors in rank order: float32 [numel], the same bits everywhere.

    `payload` None says that this rank's gradient is not finite; then, on every rank, the sum is None.
    `decode` turns a frame into float32 [numel] and raises ValueError for a payload that does not fit. Or, in its place,
    `add(payloads, out)` puts the sum of all into `out`, float32 [numel], and raises kernels.PayloadError.
    """
    if payload is None:
        payload, flags = torch.empty(0, dtype=torch.uint8), wire.NON_FINITE
    numel = gradient.numel()
    sent = wire.Frame(compressor.algorithm, gradient.dtype, slot.rank, slot.index, rate, numel, payload, flags)
    answers: list[Tensor] = yield Allgather(wire.pack(sent))
    frames = unpack(sent, answers, slot)
    if not all(frame.finite for frame in frames):
        return None
    total = torch.zeros(numel, dtype=torch.float32, device=gradient.device)
    if add and not any(frame.dense for frame in frames):
        try:
            add([frame.payload for frame in frames], total)
        except kernels.PayloadError as error:
            raise wire.WireError(error.rank, slot.name, "a payload that decodes", error) from error
        return total
    for frame in frames:
        try:
            total += _decoded(frame, decode, add).to(gradient.device)
        except ValueError as error:
            raise wire.WireError(frame.sender, slot.name, "a payload that decodes", error) from error
    return total


def _decoded(
    frame: wire.Frame,
    decode: Callable[[wire.Frame], Tensor] | None,
    add: Callable[[Sequence[Tensor], Tensor], object] | None,
) -> Tensor:
    if frame.dense:
        return decode_dense(frame)
    if decode:
        return decode(frame)
    assert add, "either decode or add"
    alone = torch.zeros(frame.numel, dtype=torch.float32)
    add([frame.payload], alone)
    return alone


def fits(payload: Tensor, gradient: Tensor) -> bool:
    """Whether a frame with `payload` is no larger than the dense gradient."""
    return wire.frame_bytes(payload.numel()) <= gradient.numel() * gradient.element_size()


def encode_dense(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The payload of a dense frame, and the float32 values that its receivers will see."""
    cast = values.to(dtype)
    return cast.contiguous().view(-1).view(torch.uint8), cast.view(-1).to(torch.float32)


def decode_dense(frame: wire.Frame) -> Tensor:
    if frame.payload.numel() != frame.numel * frame.dtype.itemsize:
        raise ValueError(f"{frame.payload.numel()} bytes for {frame.numel} dense elements of {frame.dtype}")
    return frame.payload.clone().view(frame.dtype).to(torch.float32)  # a copy: float64 needs 8-byte alignment


def unpack(sent: wire.Frame, answers: Sequence[Tensor], slot: Slot) -> list[wire.Frame]:
    """The frames that all ranks sent where this one sent `sent`. Raises WireError for any other."""
    if len(answers) != slot.size:
        raise wire.WireError(len(answers), slot.name, f"frames of {slot.size} ranks", f"{len(answers)}")
    frames = [wire.unpack(answer, peer, slot.name) for peer, answer in enumerate(answers)]
    for peer, frame in enumerate(frames):
        for what, expected, found in (
            ("sender", peer, frame.sender),
            ("parameter index", slot.index, frame.parameter),
            ("algorithm id", sent.algorithm, frame.algorithm),
            ("dtype", sent.dtype, frame.dtype),
            ("element count", sent.numel, frame.numel),
            ("rate", wire.rounded(sent.rate), frame.rate),
        ):
            if expected != found:
                raise wire.WireError(peer, slot.name, f"{what} {expected}", found)
    return frames
