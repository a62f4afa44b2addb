"""AdaComp: residual compression that adapts to the activity in each bin (Chen et al., AAAI 2018, arXiv 1712.02679).

US patent 11,295,208 B2 (IBM) reads on this method: see docs/adacomp.md before shipping it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, wire
from .base import Slot, SparsifyingCompressor

_SCALE = struct.Struct("<f")
_MAX_BIN_SIZE = 1 << 14  # the paper's 16-bit format: 14 bits of index, 2 of value


@dataclass(frozen=True)
class AdaCompCompressor(SparsifyingCompressor):
    """Sends, of each bin, the elements whose latest gradient pushes them past the bin's largest accumulated one.

    bin_size: elements of a bin, 1 to 16384; None takes the paper's 50 for convolutions and 500 for everything else.
    An element costs 8 bits on the wire for bins of up to 64, else 16, and the layer one float.
    """

    bin_size: int | None = None

    algorithm = 4

    def __post_init__(self) -> None:
        valid = isinstance(self.bin_size, int) and 1 <= self.bin_size <= _MAX_BIN_SIZE
        if self.bin_size is not None and not valid:
            raise ValueError(f"bin_size must be None or a whole number from 1 to {_MAX_BIN_SIZE}: {self.bin_size!r}")

    def bin_size_of(self, shape: torch.Size) -> int:
        """Weights with more than two dimensions are convolutions."""
        return self.bin_size or (50 if len(shape) > 2 else 500)

    def rate(self, slot: Slot) -> float:
        return self.bin_size_of(slot.shape)

    def encode(self, slot: Slot, accumulated: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Payload: the scale, float32, then gap codes of 8 bits for bins of up to 64, else 16."""
        bin_size = self.bin_size_of(slot.shape)
        positions, negative, scale = select(accumulated, gradient, bin_size)
        gaps = kernels.encode_gaps(positions, negative, _token_width(bin_size)).cpu()
        payload = torch.cat([torch.frombuffer(bytearray(_SCALE.pack(scale)), dtype=torch.uint8), gaps])
        return payload, positions, torch.where(negative, -scale, scale)

    def decode(self, frame: wire.Frame) -> Tensor:
        width = _token_width(int(frame.rate))
        gaps = frame.payload[_SCALE.size :]
        if frame.payload.numel() < _SCALE.size or gaps.numel() % (width // 8):
            raise ValueError(f"{frame.payload.numel()} bytes are no whole number of {width}-bit tokens after a scale")
        (scale,) = _SCALE.unpack(frame.payload[: _SCALE.size].numpy().tobytes())
        positions, negative = kernels.decode_gaps(gaps, width)
        if positions.numel() and int(positions[-1]) >= frame.numel:
            raise ValueError(f"position {int(positions[-1])} is past the end")
        values = torch.zeros(frame.numel, dtype=torch.float32)
        values[positions] = torch.where(negative, -scale, scale)
        return values


def select(accumulated: Tensor, gradient: Tensor, bin_size: int) -> tuple[Tensor, Tensor, float]:
    """Positions, int64 [n], their signs (negative), bool [n], and the scale of what AdaComp sends of a layer.

    `accumulated` (residual + gradient) and `gradient`: float32 [numel]. An element is sent when |accumulated +
    gradient| reaches the largest |accumulated| of its bin; the scale is the mean of those over all bins. An all-zero
    bin sends nothing.
    """
    bins = torch.nn.functional.pad(accumulated.abs(), (0, -accumulated.numel() % bin_size)).view(-1, bin_size)
    largest = bins.amax(1)
    scale = float(largest.mean(dtype=torch.float64).to(torch.float32)) if largest.numel() else 0.0
    reach = torch.repeat_interleave(largest, bin_size)[: accumulated.numel()]
    chosen = ((accumulated + gradient).abs() >= reach) & (accumulated != 0)
    positions = torch.nonzero(chosen).view(-1)
    return positions, accumulated[positions] < 0, scale


def _token_width(bin_size: int) -> int:
    return 8 if bin_size <= 64 else 16
