"""bfloat16 on the wire, added in float32. In frames, because Horovod's and MPI's reductions do not know the type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import FRAMES
from .codec import Common, ScatterCodec
from .footprint import Sent
from .gradients import flat
from .slot import Slot


@dataclass(frozen=True)
class BF16Compressor(ScatterCodec):
    """Round to the nearest bfloat16 (ties to even) on every rank; the sum of those is exact to float32 rounding."""

    algorithm = 2
    alignment = 2

    def sent(self, slot: Slot) -> Sent:
        return Sent(gathered=wire.frame_bytes(2 * slot.parameter.numel))

    def held(self, slot: Slot) -> dict[str, int]:
        return {FRAMES: wire.frame_bytes(2 * slot.parameter.numel)}

    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        values = flat(gradient)
        payload: Tensor | None = slot.workspace.room(2 * values.numel())
        if kernels.of(values).bfloat_encode(values, payload) == kernels.NOT_FINITE:
            payload = None
        return self.framed(slot, gradient, payload, rate=16.0)

    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        return float(kernels.of(out).bfloat_sum(payloads, divisor, out))

    def cut(
        self, slot: Slot, gradient: Tensor, cuts: Sequence[tuple[int, int]], common: Common | None
    ) -> list[Tensor | None]:
        values = flat(gradient)
        return [_encoded(values[start:stop]) for start, stop in cuts]

    def piece_bytes(self, slot: Slot, numel: int, *, back: bool) -> int:
        return 2 * numel

    def give_back(self, slot: Slot, total: Tensor, start: int, common: Common | None) -> Tensor | None:
        return _encoded(total)

    def take_back(self, slot: Slot, payload: Tensor, common: Common | None, divisor: float, out: Tensor) -> float:
        return self.add(slot, [payload], divisor, out)


def _encoded(values: Tensor) -> Tensor | None:
    payload = torch.empty(2 * values.numel(), dtype=torch.uint8)
    return None if kernels.of(values).bfloat_encode(values, payload) == kernels.NOT_FINITE else payload
