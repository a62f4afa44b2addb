"""bfloat16 on the wire, added in float32. In frames, because Horovod's and MPI's reductions do not know the type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import kernels, wire
from ..memory import FRAMES
from .base import Codec, Common, Slot, flat
from .footprint import Sent


@dataclass(frozen=True)
class BF16Compressor(Codec):
    """Round to the nearest bfloat16 (ties to even) on every rank; the sum of those is exact to float32 rounding."""

    algorithm = 2

    def sent(self, slot: Slot) -> Sent:
        return Sent(gathered=wire.frame_bytes(2 * slot.shape.numel()))

    def held(self, slot: Slot) -> dict[str, int]:
        return {FRAMES: wire.frame_bytes(2 * slot.shape.numel())}

    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        values = flat(gradient)
        payload: Tensor | None = slot.room(2 * values.numel())
        if kernels.of(values).bfloat_encode(values, payload) == kernels.NOT_FINITE:
            payload = None
        return self.framed(slot, gradient, payload, rate=16.0)

    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        return float(kernels.of(out).bfloat_sum(payloads, divisor, out))
