"""Top-k: the k largest entries, exactly, with error feedback (Aji and Heafield, EMNLP 2017, arXiv 1704.05021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, wire
from .base import Slot, SparsifyingCompressor


@dataclass(frozen=True)
class TopKCompressor(SparsifyingCompressor):
    """Sends the k = ceil(density * numel) largest |residual + gradient| of a layer, six bytes each.

    density: fraction that is sent, in (0, 1].
    """

    density: float = 0.01

    algorithm = 5

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1]: {self.density}")

    def k_of(self, numel: int) -> int:
        return max(math.ceil(self.density * numel - 1e-9), min(numel, 1))  # 0.07 * 100 is 7.000000000000001

    def rate(self, slot: Slot) -> float:
        return self.density

    def encode(self, slot: Slot, accumulated: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions = kernels.topk_indices(accumulated, self.k_of(accumulated.numel()))
        values = accumulated[positions]
        return kernels.pack_sparse(values, positions, accumulated.numel()), positions, values

    def decode(self, frame: wire.Frame) -> Tensor:
        values, positions = kernels.unpack_sparse(frame.payload, frame.numel)
        dense = torch.zeros(frame.numel, dtype=torch.float32)
        dense[positions] = values
        return dense
