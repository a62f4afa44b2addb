"""TernGrad: gradients as {-1, 0, 1} times one scaler per layer (Wen et al., NeurIPS 2017, arXiv 1705.07878)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, wire
from ..requests import Allreduce, Exchange, ReduceOp
from .base import Compressor, Slot, encode_dense, fits, flat32, gather_sum, max_abs

_SCALER = struct.Struct("<f")


@dataclass(frozen=True)
class TernGradCompressor(Compressor):
    """Unbiased but for the clipping; no state; 2 bits an element.

    clip_sigma: gradients are clipped to +-clip_sigma standard deviations of their layer, as in the paper (section 3.2;
        its released code only sets the scaler so); None for no clipping.
    share_scaler: all ranks use the largest of their scalers (one MAX allreduce of a float a layer), so that the average
        has 2 * size + 1 levels; else every rank uses its own.
    """

    clip_sigma: float | None = 2.5
    share_scaler: bool = True

    algorithm = 3

    def __post_init__(self) -> None:
        if self.clip_sigma is not None and not 0 < self.clip_sigma < math.inf:
            raise ValueError(f"clip_sigma must be positive, or None for no clipping: {self.clip_sigma}")

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        values = flat32(gradient)
        bound = clipping_bound(values, self.clip_sigma)
        scaler = bound
        if self.share_scaler:
            shared: Tensor = yield Allreduce(torch.tensor([scaler], dtype=torch.float32), ReduceOp.MAX)
            scaler = float(shared)
            if scaler == math.inf:  # some rank's gradient is not finite, and all ranks see it here
                return None
        payload, flags = None, 0
        if bound < math.inf:
            payload = self.encode(slot, values.clamp(-bound, bound), scaler)
            if not fits(payload, gradient):
                payload, flags = encode_dense(values, gradient.dtype)[0], wire.DENSE
        return (yield from gather_sum(self, slot, gradient, payload, _decode, rate=2.0, flags=flags))

    @staticmethod
    def encode(slot: Slot, clipped: Tensor, scaler: float) -> Tensor:
        """Payload, uint8 [4 + numel / 4 rounded up to 32]: scaler, then the packed codes of float32 [numel]."""
        key = kernels.stream_key(slot.seed, slot.index, slot.step, slot.rank)
        bits = kernels.random_bits(clipped.numel(), key, clipped.device)
        codes = kernels.pack_ternary(kernels.ternarize(clipped, scaler, bits))
        return torch.cat([torch.frombuffer(bytearray(_SCALER.pack(scaler)), dtype=torch.uint8), codes.cpu()])


def clipping_bound(values: Tensor, clip_sigma: float | None) -> float:
    """Largest |value| after clipping, as a float32; infinity when any value is not finite.

    sigma is the population standard deviation about the mean, the clipping interval is centred on 0. A constant
    gradient has sigma 0 and is not clipped: clipping would erase it.
    """
    largest = max_abs(values)
    if clip_sigma is None or not 0 < largest < math.inf:
        return largest
    sigma = float(values.to(torch.float64).std(correction=0))
    bound = _SCALER.unpack(_SCALER.pack(clip_sigma * sigma))[0] if clip_sigma * sigma < largest else largest
    return bound if bound > 0 else largest


def _decode(frame: wire.Frame) -> Tensor:
    expected = _SCALER.size + kernels.ternary_bytes(frame.numel)
    if frame.payload.numel() != expected:
        raise ValueError(f"{frame.payload.numel()} bytes, not {expected}, for {frame.numel} ternary elements")
    (scaler,) = _SCALER.unpack(frame.payload[: _SCALER.size].numpy().tobytes())
    return kernels.unpack_ternary(frame.payload[_SCALER.size :], frame.numel, scaler)
