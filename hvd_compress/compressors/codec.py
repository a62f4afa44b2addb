"""Algorithms that send frames: how one rank's frame is made, how frames add up, and who may cut a gradient."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import FRAMES, RESIDUALS, SPARE
from ..requests import Allgather, Allreduce, Exchange, ReduceOp
from .base import Compressor
from .footprint import Sent
from .frames import add_up, dense_room, encode_dense, unpack
from .gradients import flat, max_abs
from .slot import Slot

_NOTHING = torch.empty(0, dtype=torch.uint8)

AUTO, GATHER, SCATTER, HIERARCHICAL = TOPOLOGIES = ("auto", "gather", "scatter", "hierarchical")
_FEW_RANKS = 4  # that gather: one round, and nothing is encoded twice


class Common(NamedTuple):
    """What `Codec.common` gave: here, and the largest that it gave on any rank."""

    mine: float
    largest: float


class Codec(Compressor):
    """An algorithm that sends frames: how one rank's frame is made, and how those of all ranks add up.

    `exchange` moves one gradient by itself. Topologies move many together, by the same frames.
    """

    gathers = True

    def common(self, slot: Slot, gradient: Tensor) -> float | None:
        """What all ranks must know the largest of before they encode; infinity for a gradient that is not finite.

        None where there is no such thing.
        """
        return None

    @abc.abstractmethod
    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        """What this rank sends of `gradient`; proposes the new residual, if there is one."""

    @abc.abstractmethod
    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        """Put the sum of what all ranks' payloads say, in rank order, divided by `divisor`, into `out`.

        out: float32 [numel], on the CPU. Returns a bound of |out|, finite exactly if that is. Raises
        kernels.PayloadError, as the kernels do.
        """

    def grouped(self, slot: Slot) -> bool:
        """Whether this parameter travels by frames, hence can travel in one message with others."""
        return True

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        mine, common = self.common(slot, gradient), None
        if mine is not None:
            largest: Tensor = yield Allreduce(torch.tensor([mine], dtype=torch.float32), ReduceOp.MAX)
            common = Common(mine, float(largest))
        sent = self.frame(slot, gradient, common)
        answers: list[Tensor] = yield Allgather(wire.pack(sent, slot.workspace.frame), last=True)
        frames = unpack(sent, answers, slot)
        payloads, flags = [frame.payload for frame in frames], [frame.flags for frame in frames]
        return add_up(self, slot, gradient, payloads, flags)

    def framed(
        self, slot: Slot, gradient: Tensor, payload: Tensor | None, *, rate: float = 0.0, flags: int = 0
    ) -> wire.Frame:
        """A frame with this payload; None says that this rank's gradient is not finite."""
        if payload is None:
            payload, flags = _NOTHING, wire.NON_FINITE
        rank, index = slot.step.rank, slot.parameter.index
        return wire.Frame(self.algorithm, gradient.dtype, rank, index, rate, gradient.numel(), payload, flags)


class ScatterCodec(Codec):
    """A codec whose gradients can be cut into pieces, each of them added up by the rank that owns it.

    That rank encodes the sum anew, for all. What the second encoding loses is either unbiased, or kept by the owner.
    """

    alignment: int  # a gradient may be cut at multiples of it
    varying: ClassVar[bool] = False  # whether payloads of pieces of one size differ in length

    def whole(self) -> str | None:
        """Why it cannot be cut as its options are, and the remedy; None if it can."""
        return None

    def scatters(self, slot: Slot, topology: str) -> bool:
        """Whether gradients are cut, where the user asks for this topology, one of TOPOLOGIES."""
        if topology == AUTO:
            return slot.step.size > _FEW_RANKS and self.whole() is None and self.moves_less(slot)
        return topology == SCATTER

    def moves_less(self, slot: Slot) -> bool:
        """Whether a rank receives less than by gathering, with more than a few ranks."""
        return True

    def held_scattered(self, slot: Slot) -> dict[str, int]:
        """As `held`, where gradients are cut; about, of what an owner holds."""
        return {}

    @abc.abstractmethod
    def cut(
        self, slot: Slot, gradient: Tensor, cuts: Sequence[tuple[int, int]], common: Common | None
    ) -> Sequence[Tensor | None]:
        """The payloads of the pieces (start, stop) of the flattened gradient, in order; None for what is not finite.

        `add` adds them up. Proposes the new residual, if there is one.
        """

    def piece_bytes(self, slot: Slot, numel: int, *, back: bool) -> int:
        """Of the payload of a piece, or of its sum on the way back; about, where they are `varying`."""
        raise NotImplementedError

    @abc.abstractmethod
    def give_back(self, slot: Slot, total: Tensor, start: int, common: Common | None) -> Tensor | None:
        """What the owner of a piece sends of its sum, finite float32 [numel of the piece]; None if it overflows."""

    @abc.abstractmethod
    def take_back(self, slot: Slot, payload: Tensor, common: Common | None, divisor: float, out: Tensor) -> float:
        """Put what an owner sent, divided by `divisor`, into `out`, as `add` does."""

    def learn(self, slot: Slot, payloads: Sequence[Tensor], numels: Sequence[int]) -> None:
        """All pieces of a sum, as every rank has them, and their elements: what the next step may depend on."""


class SparsifyingCompressor(Codec):
    """An algorithm with error feedback that sends some of what has accumulated, in one pass of a kernel."""

    stateful = True

    @abc.abstractmethod
    def encode(self, slot: Slot, gradient: Tensor, residual: Tensor | None, kept: Tensor, room: int) -> Tensor | int:
        """The payload, in `slot.room`, of at most `room` bytes; kernels.NOT_FINITE, or kernels.TOO_LARGE.

        `gradient`: [numel], of a type that the kernels read; `residual` and `kept`: float32 [numel]. `kept` becomes
        gradient + residual, less what receivers will see of it; where the payload is too large, less nothing.
        """

    @abc.abstractmethod
    def rate_of(self, slot: Slot) -> float:
        """As of Compressor; the frame's header says it, too."""

    @abc.abstractmethod
    def payload_bytes(self, shape: torch.Size, rate: float) -> int:
        """What a rank sends of a float32 gradient of `shape` at this rate, its header included."""

    @abc.abstractmethod
    def frame_held(self, slot: Slot) -> int:
        """Bytes of the frame that is kept for the next float32 gradient."""

    def sent(self, slot: Slot) -> Sent:
        return Sent(gathered=self.payload_bytes(slot.parameter.shape, self.rate_of(slot)))

    def held(self, slot: Slot) -> dict[str, int]:
        residual = 4 * slot.parameter.numel
        return {RESIDUALS: residual, SPARE: residual, FRAMES: self.frame_held(slot)}

    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        kept = slot.memory.room(slot.name, gradient)
        residual = slot.memory.residual(slot.name, kept.device)
        encoded, flags = self.encode(slot, flat(gradient), residual, kept, dense_room(gradient)), 0
        payload = None if isinstance(encoded, int) else encoded
        if isinstance(encoded, int) and encoded == kernels.TOO_LARGE:
            dense, sent = encode_dense(kept, gradient.dtype)
            kept, flags = kept - sent, wire.DENSE
            payload = dense if max_abs(sent) < math.inf else None  # too large for the gradient's own type
        if payload is not None:
            slot.memory.propose(slot.name, kept)
        return self.framed(slot, gradient, payload, rate=self.rate_of(slot), flags=flags)
