"""ScaleCom: one rank in turn picks the entries for all (Chen et al., NeurIPS 2020, arXiv 2104.11125).

What a rank sends and receives does not grow with the number of ranks, since all of them send the same entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..memory import RESIDUALS, SPARE
from ..requests import Allreduce, Broadcast, Exchange, Total
from ..schedules import Rate, density_at, entries_of
from ..wire import WireError
from .base import Compressor
from .footprint import Sent
from .gradients import flat, flat32, max_abs
from .qsgd import QSGDCompressor
from .slot import Slot

_EXACT, _VALUE_BITS = 32, (32, 8, 4)
_VALUES_A_NORM = 64


@dataclass(frozen=True)
class ScaleComCompressor(Compressor):
    """CLT-k: the leader, rank step mod size, picks the largest |residual + gradient| of its own, and all ranks send
    theirs at those positions. Four bytes an entry, and about log2(1 / density) + 2 bits more from the leader. Small
    tensors travel as they are.

    density: fraction that is sent, in (0, 1], or a schedule of it.
    beta: of the low-pass filter residual <- residual + beta * (gradient - sent), in (0, 1]. 1 is plain error feedback.
        Less is *not lossless*: of a gradient that was not sent, only beta of it is kept, and of a residual that was
        sent, 1 - beta of it stays. It is meant for large batches and learning rates; section 3 of the paper.
    chunk: the leader picks the largest of each chunk of so many elements, which takes no sort; `density` is not used.
    value_bits: of an entry's value, 32, 8 or 4. With fewer than 32 each rank adds up a part of the entries, for all:
        values go to it by QSGD, with a norm for each 64, and back by QSGD of 8 bits. That is unbiased, not exact.
    """

    density: Rate = 0.001
    beta: float = 1.0
    chunk: int | None = None
    value_bits: int = _EXACT

    algorithm = 9
    slow_with_adam: ClassVar[bool] = True
    stateful = True

    def __post_init__(self) -> None:
        density_at(self.density, 0)
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must be in (0, 1]: {self.beta}")
        if self.chunk is not None and not (isinstance(self.chunk, int) and self.chunk >= 1):
            raise ValueError(f"chunk must be a whole number of elements, or None for no chunks: {self.chunk!r}")
        if self.value_bits not in _VALUE_BITS:
            raise ValueError(f"value_bits must be one of {', '.join(map(str, _VALUE_BITS))}: {self.value_bits!r}")

    def sent(self, slot: Slot) -> Sent:
        numel = slot.parameter.numel
        k = self.entries(slot, numel)
        if not saves(numel, k):
            return Sent(reduced=4 * numel)
        positions = kernels.position_bytes(numel, k)
        if self.value_bits == _EXACT:
            return Sent(reduced=4 * (k + 1), broadcast=positions)
        values, both = values_of(slot, k), (False, True)
        return Sent(scattered=sum(self.carrier.piece_bytes(values, k, back=back) for back in both), broadcast=positions)

    def held(self, slot: Slot) -> dict[str, int]:
        return {RESIDUALS: 4 * slot.parameter.numel, SPARE: 4 * slot.parameter.numel}

    @property
    def carrier(self) -> QSGDCompressor:
        """By which values of fewer than 32 bits travel."""
        return QSGDCompressor(bits=self.value_bits, bucket_size=_VALUES_A_NORM)

    def carried(self, slot: Slot) -> bool:
        """Whether values travel by the carrier, hence together with those of others."""
        return self.value_bits < _EXACT and saves(slot.parameter.numel, self.entries(slot, slot.parameter.numel))

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        numel = gradient.numel()
        if not saves(numel, self.entries(slot, numel)):
            return (yield from _as_it_is(self, slot, gradient))
        entries = self.begin(slot, gradient)
        entries.agree((yield Broadcast(entries.packed(), entries.leader)))
        if self.value_bits < _EXACT:
            total = yield from self.carrier.exchange(values_of(slot, entries.count), entries.values())
            return None if total is None else entries.total(total)
        # How many ranks have what is not finite, which need not be at these positions, and, past the number of ranks,
        # how many got no positions: so all ranks learn of both.
        flag = (not entries.finite) + (not entries.sound) * (slot.step.size + 1.0)
        values = entries.values()
        summed: Tensor = yield Allreduce(torch.cat([values, values.new_tensor([flag])]), last=True)
        summed, flags = summed[:-1], float(summed[-1])
        if flags > slot.step.size:
            found = "others on this rank" if not entries.sound else "others on another rank"
            raise WireError(entries.leader, slot.name, f"{entries.count} ascending positions below {numel}", found)
        if flags or (largest := max_abs(summed)) == math.inf:
            return None
        return entries.total(Total(summed / slot.step.divisor, slot.step.divisor, largest))

    def begin(self, slot: Slot, gradient: Tensor) -> Entries:
        """What has accumulated of a gradient, and what this rank would pick of it if it leads."""
        k, accumulated = self.entries(slot, gradient.numel()), slot.memory.room(slot.name, gradient)
        residual, leads = slot.memory.residual(slot.name, accumulated.device), slot.step.rank == _leader(slot)
        picked = self._pick(flat(gradient), residual, accumulated, k, leads=leads)
        finite = picked is not None
        return Entries(self, slot, accumulated, torch.arange(k) if picked is None else picked, finite)

    def rate_of(self, slot: Slot) -> float:
        """The density of this step."""
        if self.chunk is not None:
            return 1 / self.chunk
        return density_at(self.density if slot.rate is None else slot.rate, slot.step.number)

    def entries(self, slot: Slot, numel: int) -> int:
        """How many entries are sent: the same on every rank."""
        return -(-numel // self.chunk) if self.chunk is not None else entries_of(self.rate_of(slot), numel)

    def _pick(
        self, gradient: Tensor, residual: Tensor | None, accumulated: Tensor, k: int, *, leads: bool
    ) -> Tensor | None:
        """`accumulated` = residual + gradient; returns the positions to send, int64 [k], of a rank that leads.

        Of others they are any. None where something is not finite.
        """
        kernel = kernels.of(gradient)
        if not leads or self.chunk is not None:
            finite = kernel.accumulate(gradient, residual, accumulated) < math.inf
            if not leads or not finite:
                return torch.arange(k) if finite else None
            return kernel.chunk_largest(accumulated, self.chunk)
        payload = torch.empty(kernels.sparse_bytes(gradient.numel(), k), dtype=torch.uint8)
        if kernel.topk_encode(gradient, residual, accumulated, k, payload) == kernels.NOT_FINITE:
            return None
        values, positions = (part.to(accumulated.device) for part in kernels.unpack_sparse(payload, gradient.numel()))
        accumulated[positions] = values
        return positions

    def filtered(self, residual: Tensor | None, unsent: Tensor) -> Tensor:
        """The new residual, in the memory of `unsent`."""
        if self.beta == 1:
            return unsent
        return unsent.mul_(self.beta) if residual is None else torch.lerp(residual, unsent, self.beta, out=unsent)


@dataclass
class Entries:
    """What a rank has accumulated of a gradient, and the entries of it that all ranks send."""

    compressor: ScaleComCompressor
    slot: Slot
    accumulated: Tensor  # float32 [numel]
    positions: Tensor  # int64 [k], ascending: this rank's own until all agree
    finite: bool
    sound: bool = True  # whether the leader's positions have come

    @property
    def leader(self) -> int:
        return _leader(self.slot)

    @property
    def count(self) -> int:
        return self.positions.numel()

    def packed(self) -> Tensor:
        """The positions, uint8 on the device of the gradient, in the code of kernels/positions.py."""
        positions = self.positions.cpu()
        packed: Tensor = kernels.of(positions).positions_encode(positions, self.accumulated.numel())
        return packed.to(self.accumulated.device)

    def agree(self, packed: Tensor) -> None:
        """Send those of the leader."""
        packed = packed.cpu()
        try:
            positions = kernels.of(packed).positions_decode(packed, self.accumulated.numel(), self.count)
        except ValueError:
            self.sound, positions = False, torch.arange(self.count)
        self.positions = positions.to(self.accumulated.device)

    def values(self) -> Tensor:
        """Float32 [k]; not finite where the gradient is not."""
        values = self.accumulated[self.positions]
        return values if self.finite else torch.full_like(values, math.nan)

    def total(self, summed: Total) -> Total:
        """The sum of the gradients, of that of these entries; proposes the new residual."""
        slot, accumulated = self.slot, self.accumulated
        accumulated[self.positions] = 0
        residual = slot.memory.residual(slot.name, accumulated.device)
        slot.memory.propose(slot.name, self.compressor.filtered(residual, accumulated))
        out = slot.room_for_sum(accumulated).zero_().index_copy_(0, self.positions, summed.values)
        return summed._replace(values=out)


def _leader(slot: Slot) -> int:
    """The rank that picks in this step."""
    return slot.step.number % slot.step.size


def values_of(slot: Slot, entries: int) -> Slot:
    """The place of the values of so many entries, without a state of their own."""
    return Slot(replace(slot.parameter, shape=torch.Size([entries]), tensor=None), slot.step)


def _as_it_is(compressor: ScaleComCompressor, slot: Slot, gradient: Tensor) -> Exchange:
    accumulated = slot.memory.compensate(slot.name, flat32(gradient))
    total: Tensor = yield Allreduce(accumulated, last=True)
    if max_abs(total) == math.inf:
        return None
    residual = slot.memory.residual(slot.name, accumulated.device)
    slot.memory.propose(slot.name, compressor.filtered(residual, torch.zeros_like(accumulated)))
    return Total(total)


def saves(numel: int, entries: int) -> bool:
    """Whether positions and values of so many entries are fewer bytes than all values are."""
    return kernels.position_bytes(numel, entries) + 4 * (entries + 1) < 4 * numel
