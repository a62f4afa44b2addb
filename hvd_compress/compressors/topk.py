"""Top-k: the k largest entries, exactly, with error feedback (Aji and Heafield, EMNLP 2017, arXiv 1704.05021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, wire
from ..schedules import Rate, density_at, entries_of
from .codec import Common, SparsifyingCompressor
from .entries import EntriesCodec
from .frames import frame_room
from .gradients import flat32, max_abs
from .slot import Slot

_DENSITIES = tuple(2.0 ** (-quarter / 4) for quarter in range(53))  # 1 to 1/8192
_BIN_BITS = 16  # of a magnitude's float32 that are left out in the histogram: bins of 1/128 relative width
_BINS = 1 << (31 - _BIN_BITS)
_PART = 1 << 20  # elements at a time


@dataclass(frozen=True)
class TopKCompressor(EntriesCodec, SparsifyingCompressor):
    """Sends the k = ceil(density * numel) largest |residual + gradient| of a layer, six bytes each or less.

    density: fraction that is sent, in (0, 1], or a schedule of it.
    value_bits: of each entry that is sent, 32, 8 or 4. With fewer than 32 its position takes about log2(1 / density) +
        2 bits, and what rounding loses waits in the residual. Gradients that travel as they are, since six bytes an
        entry would be no less, are not rounded.
    """

    density: Rate = 0.01
    value_bits: int = 32

    algorithm = 5

    def __post_init__(self) -> None:
        density_at(self.density, 0)
        self.check_value_bits()

    @property
    def slow_with_adam(self) -> bool:  # type: ignore[override]
        return self.density != 1.0

    def rate_of(self, slot: Slot) -> float:
        return density_at(self.density if slot.rate is None else slot.rate, slot.step.number)

    def wanted(self, slot: Slot) -> int:
        return entries_of(self.rate_of(slot), slot.parameter.numel)

    def frame_held(self, slot: Slot) -> int:
        numel = slot.parameter.numel
        k = entries_of(self.rate_of(slot), numel)
        return frame_room(kernels.sparse_bytes(numel, k) if _saves(numel, k) else 0)

    def encode(self, slot: Slot, gradient: Tensor, residual: Tensor | None, kept: Tensor, room: int) -> Tensor | int:
        kernel, k = kernels.of(gradient), entries_of(self.rate_of(slot), gradient.numel())
        length = kernels.sparse_bytes(gradient.numel(), k)
        if length > room:
            finite = kernel.accumulate(gradient, residual, kept) < math.inf
            return kernels.TOO_LARGE if finite else kernels.NOT_FINITE
        payload = slot.workspace.room(length)
        failed = kernel.topk_encode(gradient, residual, kept, k, payload) == kernels.NOT_FINITE
        return kernels.NOT_FINITE if failed else payload

    def selected(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        return SparsifyingCompressor.frame(self, slot, gradient, common)

    def candidates(self, shape: torch.Size) -> tuple[float, ...]:
        """The densities that a controller may choose from for a gradient of `shape`, each 2**0.25 times the one before;
        none if none saves."""
        numel = shape.numel()
        return tuple(density for density in reversed(_DENSITIES) if _saves(numel, entries_of(density, numel)))

    def payload_bytes(self, shape: torch.Size, rate: float) -> int:
        """What a rank sends of a float32 gradient of `shape` at density `rate`, its header included, exactly."""
        numel = shape.numel()
        k = entries_of(density_at(rate, 0), numel)
        return wire.frame_bytes(self.entry_bytes(numel, k) if _saves(numel, k) else 4 * numel)

    def errors(self, gradient: Tensor, rates: Sequence[float]) -> list[float]:
        """L2 norm of what is not sent at each of these densities, of all from one histogram.

        Right to 1 %: entries of about the same magnitude (to 1/128) count as equal. A gradient that is not finite has
        infinite errors.
        """
        values = flat32(gradient)
        numel, largest = values.numel(), max_abs(values)
        if not 0 < largest < math.inf:
            return [largest] * len(rates)
        counts, squares = _histogram(values, largest)
        ks = [entries_of(density_at(rate, 0), numel) for rate in rates]
        return [largest * math.sqrt(_tail(counts, squares, numel - k)) if _saves(numel, k) else 0.0 for k in ks]


def _saves(numel: int, entries: int) -> bool:
    return wire.frame_bytes(kernels.sparse_bytes(numel, entries)) <= 4 * numel


def _histogram(values: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """How many of float32 [numel] have a magnitude of each bin or below, int64, and the sums of the squares of these,
    float64, in units of `largest`.

    The bits of a positive float32 ascend with its value: their upper half is the number of the bin.
    """
    counts = torch.zeros(_BINS, dtype=torch.int64, device=values.device)
    squares = torch.zeros(_BINS, dtype=torch.float64, device=values.device)
    for part in values.split(_PART):
        units = part.abs() / largest
        bins = units.view(torch.int32).bitwise_right_shift(_BIN_BITS).to(torch.int64)
        counts += torch.bincount(bins, minlength=_BINS)
        squares += torch.bincount(bins, units.to(torch.float64).square_(), _BINS)
    return counts.cumsum(0), squares.cumsum(0)


def _tail(counts: Tensor, squares: Tensor, left: int) -> float:
    """The sum of the squares of the `left` smallest; of a bin that is taken in part, that part of its sum."""
    if left <= 0:
        return 0.0
    place = int(torch.searchsorted(counts, left))
    below, sum_below = (int(counts[place - 1]), float(squares[place - 1])) if place else (0, 0.0)
    inside = int(counts[place]) - below
    return sum_below + (float(squares[place]) - sum_below) * (left - below) / inside
