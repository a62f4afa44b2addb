"""Half precision on the wire, as horovod.torch.Compression.fp16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import SummedCompressor
from .footprint import Sent
from .gradients import narrowed
from .slot import Slot


@dataclass(frozen=True)
class FP16Compressor(SummedCompressor):
    """Cast to float16, add in float16. Values past 65504 become infinite; a sum may be larger, if its mean fits."""

    algorithm = 1

    def sent(self, slot: Slot) -> Sent:
        return Sent(reduced=2 * slot.parameter.numel)

    def summand(self, gradient: Tensor, size: int = 1) -> Tensor:
        return narrowed(gradient, size).to(torch.float16) if gradient.is_floating_point() else gradient
