"""Half precision on the wire, as horovod.torch.Compression.fp16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Slot, SummedCompressor
from .footprint import Sent


@dataclass(frozen=True)
class FP16Compressor(SummedCompressor):
    """Cast to float16, add in float16. Values past 65504 become infinite, in the sum too."""

    algorithm = 1

    def sent(self, slot: Slot) -> Sent:
        return Sent(reduced=2 * slot.shape.numel())

    def summand(self, gradient: Tensor) -> Tensor:
        return gradient.to(torch.float16) if gradient.is_floating_point() else gradient
