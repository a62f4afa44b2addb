"""AdaComp: residual compression that adapts to the activity in each bin (Chen et al., AAAI 2018, arXiv 1712.02679).

US patent 11,295,208 B2 (IBM) reads on this method: see docs/methods/adacomp.md before shipping it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels, wire
from ..schedules import Rate, describe
from .codec import SparsifyingCompressor
from .frames import most_room
from .gradients import flat, max_abs
from .slot import Slot

_MAX_BIN_SIZE = 1 << 14  # the paper's 16-bit format: 14 bits of index, 2 of value
_BIN_SIZES = (10, 20, 35, 50, 64, 100, 150, 200, 350, 500, 1000, 2000, 5000, 10_000, _MAX_BIN_SIZE)
_ENTRIES = 5  # of a bin that are sent, about: the paper's 200 times in bins of 500 at 16 bits


@dataclass(frozen=True)
class AdaCompCompressor(SparsifyingCompressor):
    """Sends, of each bin, the elements whose latest gradient pushes them past the bin's largest accumulated one.

    bin_size: elements of a bin, 1 to 16384, or a schedule of it; None takes the paper's 50 for convolutions and 500 for
        everything else.
    An element costs 8 bits on the wire for bins of up to 64, else 16, and the layer one float.
    """

    bin_size: Rate | None = None

    algorithm = 4
    slow_with_adam: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bin_size is not None:
            _size_at(self.bin_size, 0)

    def bin_size_of(self, shape: torch.Size, step: int = 0) -> int:
        """Weights with more than two dimensions are convolutions."""
        usual = 50 if len(shape) > 2 else 500
        return usual if self.bin_size is None else _size_at(self.bin_size, step)

    def rate_of(self, slot: Slot) -> int:
        parameter, step = slot.parameter, slot.step.number
        return self.bin_size_of(parameter.shape, step) if slot.rate is None else _size_at(slot.rate, step)

    def frame_held(self, slot: Slot) -> int:
        return wire.frame_bytes(most_room(slot.parameter.numel))

    def encode(self, slot: Slot, gradient: Tensor, residual: Tensor | None, kept: Tensor, room: int) -> Tensor | int:
        """Payload: the scale, float32, then gap codes of 8 bits for bins of up to 64, else 16."""
        payload, bin_size = slot.workspace.room(max(room, 0)), self.rate_of(slot)
        length = kernels.of(gradient).adacomp_encode(gradient, residual, kept, bin_size, payload)
        return int(length) if length < 0 else payload[:length]

    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        width = kernels.token_width(self.rate_of(slot))
        return float(kernels.of(out).gaps_sum(payloads, width, divisor, out))

    def candidates(self, shape: torch.Size) -> tuple[float, ...]:
        """The bin sizes that a controller may choose from for a gradient of `shape`; none if none saves."""
        numel = shape.numel()
        return tuple(float(size) for size in _BIN_SIZES if size <= numel and _estimate(numel, size) < 4 * numel)

    def payload_bytes(self, shape: torch.Size, rate: float) -> int:
        """About what a rank sends of a float32 gradient of `shape` in bins of `rate`, its header included.

        An estimate, the only one of these: how many elements are sent depends on the gradients. It assumes five a bin.
        """
        return min(_estimate(shape.numel(), _size_at(rate, 0)), wire.frame_bytes(4 * shape.numel()))

    def errors(self, gradient: Tensor, rates: Sequence[float]) -> list[float]:
        """L2 norm of gradient - C(gradient) in bins of each of these sizes, without a residual.

        A gradient that is not finite has infinite errors.
        """
        values = flat(gradient)
        kernel, largest = kernels.of(values), max_abs(values)
        if not 0 < largest < math.inf:
            return [largest] * len(rates)
        kept = torch.empty(values.numel(), dtype=torch.float32, device=values.device)
        payload = torch.empty(4 * values.numel(), dtype=torch.uint8)
        norms = []
        for rate in rates:
            sent = kernel.adacomp_encode(values, None, kept, _size_at(rate, 0), payload) != kernels.TOO_LARGE
            norms.append(float(torch.linalg.vector_norm(kept, dtype=torch.float64)) if sent else 0.0)
        return norms


def _estimate(numel: int, bin_size: int) -> int:
    entries = min(_ENTRIES, bin_size) * -(-numel // bin_size)
    return wire.frame_bytes(4 + entries * kernels.token_width(bin_size) // 8)


def _size_at(rate: Rate, step: int) -> int:
    size = rate(step) if callable(rate) else rate
    if size not in range(1, _MAX_BIN_SIZE + 1):
        known = f"{describe(rate)} gives {size!r} at step {step}"
        raise ValueError(f"bin_size must be None or a whole number from 1 to {_MAX_BIN_SIZE}: {known}")
    return int(size)
