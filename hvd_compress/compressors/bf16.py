"""bfloat16 on the wire, added in float32. In frames, because Horovod's and MPI's reductions do not know the type."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import wire
from ..requests import Exchange
from .base import Compressor, Slot, flat32, gather_sum, max_abs


@dataclass(frozen=True)
class BF16Compressor(Compressor):
    """Round to the nearest bfloat16 (ties to even) on every rank; the sum of those is exact to float32 rounding."""

    algorithm = 2

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        values = flat32(gradient).to(torch.bfloat16)
        payload = values.view(torch.uint8) if max_abs(values) < math.inf else None
        return (yield from gather_sum(self, slot, gradient, payload, _decode, rate=16.0))


def _decode(frame: wire.Frame) -> Tensor:
    if frame.payload.numel() != 2 * frame.numel:
        raise ValueError(f"{frame.payload.numel()} bytes for {frame.numel} bfloat16 elements")
    return frame.payload.view(torch.bfloat16).to(torch.float32)
