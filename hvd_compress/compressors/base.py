"""The contract of every algorithm: how one rank's gradient becomes requests, and the answers a sum over the ranks."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import FRAMES, MOMENTUM, RESIDUALS, SPARE, ErrorFeedback, key
from ..requests import Allgather, Allreduce, Exchange, ReduceOp
from ..schedules import value_at
from .footprint import Sent

AUTO, GATHER, SCATTER, HIERARCHICAL = TOPOLOGIES = ("auto", "gather", "scatter", "hierarchical")
_FEW_RANKS = 4  # that gather: one round, and nothing is encoded twice


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
    rate: float | None = None  # set by a controller, in place of the compressor's own
    parameter: Tensor | None = None
    compressed: bool = True  # neither too small, nor a vector, nor excluded
    loss_scale: float | None = None  # of this step, if it is known
    cache: Any = None  # what the compressor would otherwise find out anew in every step
    frame: Tensor | None = None  # the last frame that was sent, uint8: room for the next one
    payload: Tensor | None = None  # the part of it that `room` gave
    out: Tensor | None = None  # float32 [numel]: where the sum may go, in place of new memory
    divisor: float = 1.0  # what the sum may be divided by, by who then says so:
    divided: bool = False
    bound: float | None = None  # of all |sum|, finite exactly if they are; None where nobody has looked

    def room(self, payload_bytes: int) -> Tensor:
        """Where in the next frame the payload goes, uint8 [payload_bytes]; what was there is lost."""
        if self.frame is None or self.frame.numel() < wire.frame_bytes(payload_bytes):
            self.frame, self.payload = torch.empty(wire.frame_bytes(payload_bytes), dtype=torch.uint8), None
        if self.payload is None or self.payload.numel() != payload_bytes:
            self.payload = self.frame[wire.HEADER_BYTES : wire.HEADER_BYTES + payload_bytes]
        return self.payload


class Compressor(abc.ABC):
    """An algorithm with its options: a frozen dataclass, hence comparable, hashable and printable.

    It holds no state: residuals are in the slot's memory, random numbers come from (seed, parameter, step, rank).
    """

    algorithm: ClassVar[int]  # id in the frames; never reused
    stateful: ClassVar[bool] = False  # whether it keeps residuals in the slot's memory
    takes_all: ClassVar[bool] = False  # whether it sees the parameters that are not compressed, too
    replaces: ClassVar[str] = ""  # what it does in place of the optimizer
    slow_with_adam: ClassVar[bool] = False  # whether Adam was seen to learn more slowly by what it sends
    label: ClassVar[str] = ""  # of its method of Compression, where that is not the name of the class

    def chosen(self, slot: Slot) -> Compressor | None:
        """Who exchanges this parameter in this step: the same on every rank. None for as it is."""
        return self if slot.compressed or self.takes_all else None

    def terms(self, slots: Sequence[Slot], step: int) -> Mapping[str, str]:
        """What decides the collectives of `step` besides the options, in words by what it is: schedules, masks."""
        options = self.options().items()
        return {name: repr(value_at(value, step)) for name, value in options if callable(value)}

    @property
    def varies(self) -> bool:
        """Whether all ranks must compare `terms` before each step, since these may change while training runs."""
        return any(callable(value) for value in self.options().values())

    def disagreement(self, what: str, ranks_by_state: Mapping[str, Sequence[int]], size: int) -> Exception | None:
        """The error for terms that differ; None for the usual one."""
        return None

    def conflict(self, optimizer: torch.optim.Optimizer) -> str | None:
        """What is wrong with exchanging gradients for this optimizer so, and the remedy; None if nothing is."""
        return None

    @property
    def keeps_momentum(self) -> bool:
        """Whether its state has the momentum of this rank's gradients."""
        return False

    @property
    def changes_meaning(self) -> bool:
        """Whether what comes of an exchange is a gradient in some steps, and something else in others."""
        return False

    def gives_momentum(self, slot: Slot) -> bool:
        """Whether what comes of this step's exchange is momentum, for an optimizer that takes it for one."""
        return False

    def switched_off(self, plain: Compressor) -> Compressor:
        """What takes its place where nothing is to be compressed; `plain` sends gradients as they are."""
        return plain

    @abc.abstractmethod
    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        """Exchange `gradient`, of any floating dtype and shape, which stays as it is; see requests.Exchange."""

    def rate_of(self, slot: Slot) -> float | None:
        """The density, bits or the like of this step: a controller's, or its own; None where there is no such thing."""
        return None

    def sent(self, slot: Slot) -> Sent | None:
        """What a rank gives to collectives for a float32 gradient at the present rate, about; None where unknown."""
        return None

    def held(self, slot: Slot) -> dict[str, int]:
        """Bytes that a rank holds between steps for a float32 gradient at the present rate: by what, as memory.Held."""
        return {}

    def cached(self, slot: Slot) -> Sequence[Tensor]:
        """The tensors of its own that `slot.cache` holds."""
        return ()

    def owed(self, slot: Slot, gradient: Tensor) -> Tensor:
        """All that an exchange would send if it lost nothing, [numel]: the gradient, and what was not sent before."""
        return slot.memory.compensate(slot.name, flat32(gradient)) if self.stateful else gradient.detach().reshape(-1)

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


class SummedCompressor(Compressor):
    """An algorithm whose whole exchange is one SUM of a type that Horovod and MPI can add: no frames, no carrier."""

    @abc.abstractmethod
    def summand(self, gradient: Tensor, size: int = 1) -> Tensor:
        """What is added up over the ranks in place of `gradient`.

        size: of how many summands the sum may be too large for float16, though their mean is not: where that is the
            type, they are divided by a power of two that is no smaller. It costs numbers below 2**-14 * size bits.
        """

    def restore(self, total: Tensor, shape: torch.Size, dtype: torch.dtype, size: int = 1) -> Tensor:
        """The aggregated gradient, from what came of the summands of this `size`."""
        return widened(total, size).to(dtype)

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        dtype = torch.float32 if gradient.dtype != torch.float64 else torch.float64
        summand = self.summand(gradient)
        half: Tensor = yield Allreduce(summand, last=summand.dtype != torch.float16)
        total = half.to(dtype).reshape(-1)
        if half.dtype == torch.float16 and slot.size > 1 and not math.isfinite(max_abs(total)):
            # As seldom as gradients are so large; dividing all of them would cost small ones their bits.
            smaller: Tensor = yield Allreduce(self.summand(gradient, slot.size), last=True)
            total = torch.where(total.isfinite(), total, widened(smaller, slot.size).to(dtype).reshape(-1))
        return total


def narrowed(summand: Tensor, size: int) -> Tensor:
    """Small enough for the sum of so many to fit in float16, if their mean does."""
    return summand / _power_of_two(size) if size > 1 else summand


def widened(total: Tensor, size: int) -> Tensor:
    """Undo `narrowed` for the sum or the mean of float16 summands, in float32; of other types it is as it was."""
    return total.float() * _power_of_two(size) if size > 1 and total.dtype == torch.float16 else total


def _power_of_two(size: int) -> int:
    """The smallest that is at least `size`: no more bits are lost than it has."""
    return 1 << (size - 1).bit_length()


class Common(NamedTuple):
    """What `Codec.common` gave: here, and the largest that it gave on any rank."""

    mine: float
    largest: float


class Codec(Compressor):
    """An algorithm that sends frames: how one rank's frame is made, and how those of all ranks add up.

    `exchange` moves one gradient by itself. Topologies move many together, by the same frames.
    """

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
        answers: list[Tensor] = yield Allgather(wire.pack(sent, slot.frame), last=True)
        frames = unpack(sent, answers, slot)
        payloads, flags = [frame.payload for frame in frames], [frame.flags for frame in frames]
        return add_up(self, slot, gradient, payloads, flags)

    def framed(
        self, slot: Slot, gradient: Tensor, payload: Tensor | None, *, rate: float = 0.0, flags: int = 0
    ) -> wire.Frame:
        """A frame with this payload; None says that this rank's gradient is not finite."""
        if payload is None:
            payload, flags = _NOTHING, wire.NON_FINITE
        return wire.Frame(self.algorithm, gradient.dtype, slot.rank, slot.index, rate, gradient.numel(), payload, flags)


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
            return slot.size > _FEW_RANKS and self.whole() is None and self.moves_less(slot)
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
        return Sent(gathered=self.payload_bytes(slot.shape, self.rate_of(slot)))

    def held(self, slot: Slot) -> dict[str, int]:
        residual = 4 * slot.shape.numel()
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


def most_room(numel: int) -> int:
    """Bytes that a payload may have so that its frame is no larger than `numel` float32 values."""
    return max(4 * numel - wire.HEADER_BYTES, 0)


def frame_room(payload_bytes: int) -> int:
    """What `Slot.room` holds of it for the next step."""
    return wire.frame_bytes(payload_bytes) if payload_bytes else 0


def flat32(gradient: Tensor) -> Tensor:
    """`gradient` as float32 [numel], without a copy where it already is."""
    return gradient.detach().reshape(-1).to(torch.float32)


def flat(gradient: Tensor) -> Tensor:
    """`gradient` as [numel] in a type that the kernels read: as it is where it can be, float64 as float32."""
    values = gradient.detach().reshape(-1)
    return values if values.dtype in (torch.float32, torch.float16, torch.bfloat16) else values.to(torch.float32)


def momentum_of(
    slot: Slot, gradient: Tensor, factor: float, out: Tensor | None = None, *, nesterov: bool = False
) -> Tensor:
    """The next momentum of this rank, factor * last + gradient, float32 [numel], in `out` or new memory; not proposed.

    By Nesterov, factor * (last + gradient). `gradient`: [numel], of a type that the kernels read.
    """
    velocity = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device) if out is None else out
    before = slot.memory.residual(key(slot.name, MOMENTUM), gradient.device)
    kernels.of(gradient).momentum(gradient, before, factor, nesterov, velocity)
    return velocity


def max_abs(values: Tensor) -> float:
    """Largest |value|; infinity when any is not finite, 0 for an empty tensor."""
    return float(kernels.of(values).largest(values))


def add_up(
    codec: Codec, slot: Slot, gradient: Tensor, payloads: Sequence[Tensor], flags: Sequence[int]
) -> Tensor | None:
    """The sum of what all ranks' payloads say, in rank order: float32 [numel], the same bits on all ranks.

    flags: of the payloads' frames. None when the gradient of any rank is not finite.
    """
    if any(flag & wire.NON_FINITE for flag in flags):
        return None
    out = slot.out
    if out is None:
        out = torch.empty(gradient.numel(), dtype=torch.float32, device=gradient.device)
    add = codec.add
    if any(flag & wire.DENSE for flag in flags):
        add = functools.partial(_add_some_dense, codec, flags, gradient.dtype)
    try:
        slot.bound = kernels.on_host(lambda host: add(slot, payloads, slot.divisor, host), out)
    except kernels.PayloadError as error:
        raise wire.WireError(error.rank, slot.name, "a payload that decodes", error) from error
    slot.divided = True
    return out


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _add_some_dense(
    codec: Codec,
    flags: Sequence[int],
    dtype: torch.dtype,
    slot: Slot,
    payloads: Sequence[Tensor],
    divisor: float,
    out: Tensor,
) -> float:
    """As `Codec.add`, where some payloads are the dense tensor."""
    out.zero_()
    one = torch.empty_like(out)
    for rank, (flag, payload) in enumerate(zip(flags, payloads)):
        try:
            if flag & wire.DENSE:
                one.copy_(decode_dense(payload, dtype, out.numel()))
            else:
                codec.add(slot, [payload], 1.0, one)
        except ValueError as error:
            raise kernels.PayloadError(rank, str(error)) from error
        out += one
    if divisor != 1:
        out /= divisor
    return max_abs(out)


def dense_room(gradient: Tensor) -> int:
    """Bytes that a payload may have so that its frame is no larger than the dense gradient; may be negative."""
    return (gradient.numel() * gradient.element_size() - wire.HEADER_BYTES) // 4 * 4


def encode_dense(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The payload of a dense frame, and the float32 values that its receivers will see."""
    cast = values.to(dtype)
    return cast.contiguous().view(-1).view(torch.uint8), cast.view(-1).to(torch.float32)


def decode_dense(payload: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    if payload.numel() != numel * dtype.itemsize:
        raise ValueError(f"{payload.numel()} bytes for {numel} dense elements of {dtype}")
    return payload.clone().view(dtype).to(torch.float32)  # a copy: float64 needs 8-byte alignment


def unpack(sent: wire.Frame, answers: Sequence[Tensor], slot: Slot) -> list[wire.Frame]:
    """The frames that all ranks sent where this one sent `sent`. Raises WireError for any other."""
    if len(answers) != slot.size:
        raise wire.WireError(len(answers), slot.name, f"frames of {slot.size} ranks", f"{len(answers)}")
    frames = [wire.unpack(answer, peer, slot.name) for peer, answer in enumerate(answers)]
    expected = slot.index, sent.algorithm, sent.dtype, sent.numel, wire.rounded(sent.rate)
    for peer, frame in enumerate(frames):
        found = frame.parameter, frame.algorithm, frame.dtype, frame.numel, frame.rate
        if frame.sender != peer or found != expected:
            raise _difference(peer, slot, (peer, *expected), (frame.sender, *found))
    return frames


_FIELDS = ("sender", "parameter index", "algorithm id", "dtype", "element count", "rate")


def _difference(peer: int, slot: Slot, expected: Sequence[object], found: Sequence[object]) -> wire.WireError:
    """What the first field of _FIELDS says that is not as expected."""
    what, wanted, got = next(three for three in zip(_FIELDS, expected, found) if three[1] != three[2])
    return wire.WireError(peer, slot.name, f"{what} {wanted}", got)
