"""TernGrad: gradients as {-1, 0, 1} times one scaler per layer (Wen et al., NeurIPS 2017, arXiv 1705.07878)."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import FRAMES
from .codec import Common, ScatterCodec
from .footprint import Sent
from .frames import dense_room, encode_dense, frame_room, most_room
from .gradients import flat, flat32
from .slot import Slot

_SCALER = struct.Struct("<f")
_ONE = torch.tensor([1.0]).view(torch.uint8)


@dataclass(frozen=True)
class TernGradCompressor(ScatterCodec):
    """Unbiased but for the clipping; no state; 2 bits an element.

    clip_sigma: gradients are clipped to +-clip_sigma standard deviations of their layer, as in the paper (section 3.2;
        its released code only sets the scaler so); None for no clipping.
    share_scaler: all ranks use the largest of their scalers (one MAX allreduce of a float a layer), so that the average
        has 2 * size + 1 levels; else every rank uses its own.
    """

    clip_sigma: float | None = 2.5
    share_scaler: bool = True

    algorithm = 3
    alignment = 128

    def __post_init__(self) -> None:
        if self.clip_sigma is not None and not 0 < self.clip_sigma < math.inf:
            raise ValueError(f"clip_sigma must be positive, or None for no clipping: {self.clip_sigma}")

    def sent(self, slot: Slot) -> Sent:
        numel = slot.parameter.numel
        frame = wire.frame_bytes(_payload_bytes(numel) or 4 * numel)
        return Sent(gathered=frame, reduced=4 * self.share_scaler)

    def held(self, slot: Slot) -> dict[str, int]:
        return {FRAMES: frame_room(_payload_bytes(slot.parameter.numel))}

    def common(self, slot: Slot, gradient: Tensor) -> float | None:
        return clipping_bound(flat(gradient), self.clip_sigma) if self.share_scaler else None

    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        values = flat(gradient)
        bound, scaler = common or [clipping_bound(values, self.clip_sigma)] * 2
        payload, flags = None, 0
        if scaler < math.inf:
            length = 4 + kernels.ternary_bytes(values.numel())
            if length <= dense_room(gradient):
                payload = slot.workspace.room(length)
                kernels.of(values).ternary_encode(values, bound, scaler, *slot.rounding(), payload)
            else:
                payload, flags = encode_dense(flat32(gradient), gradient.dtype)[0], wire.DENSE
        return self.framed(slot, gradient, payload, rate=2.0, flags=flags)

    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        return float(kernels.of(out).ternary_sum(payloads, divisor, out))

    def whole(self) -> str | None:
        if self.share_scaler:
            return None
        return "sums of ternary numbers are whole multiples of one scaler: give share_scaler=True"

    def cut(
        self, slot: Slot, gradient: Tensor, cuts: Sequence[tuple[int, int]], common: Common | None
    ) -> list[Tensor | None]:
        """With 1 in place of the scaler: what is added up are whole numbers."""
        assert common is not None
        if common.largest == math.inf:
            return [None] * len(cuts)
        values, (key, opposite) = flat(gradient), slot.rounding()
        payloads: list[Tensor | None] = []
        for start, stop in cuts:
            payload = torch.empty(self.piece_bytes(slot, stop - start, back=False), dtype=torch.uint8)
            piece, of_piece = values[start:stop], kernels.key_at(key, start)
            kernels.of(values).ternary_encode(piece, common.mine, common.largest, of_piece, opposite, payload)
            payload[: _SCALER.size] = _ONE
            payloads.append(payload)
        return payloads

    def piece_bytes(self, slot: Slot, numel: int, *, back: bool) -> int:
        return kernels.count_bytes(numel, slot.step.size) if back else _SCALER.size + kernels.ternary_bytes(numel)

    def give_back(self, slot: Slot, total: Tensor, start: int, common: Common | None) -> Tensor | None:
        """Exact: one of 2 * size + 1 numbers."""
        payload = torch.empty(self.piece_bytes(slot, total.numel(), back=True), dtype=torch.uint8)
        kernels.of(total).counts_encode(total, slot.step.size, payload)
        return payload

    def take_back(self, slot: Slot, payload: Tensor, common: Common | None, divisor: float, out: Tensor) -> float:
        assert common is not None
        return float(kernels.of(out).counts_decode(payload, slot.step.size, common.largest, divisor, out))


def clipping_bound(values: Tensor, clip_sigma: float | None) -> float:
    """Largest |value| after clipping, as a float32; infinity when any value is not finite.

    sigma is the population standard deviation about the mean, the clipping interval is centred on 0. A constant
    gradient has sigma 0 and is not clipped: clipping would erase it.
    """
    kernel = kernels.of(values)
    if clip_sigma is None:
        return float(kernel.largest(values))
    largest, sigma = kernel.moments(values)
    bound = _SCALER.unpack(_SCALER.pack(clip_sigma * sigma))[0] if clip_sigma * sigma < largest else largest
    return float(bound if bound > 0 else largest)


def _payload_bytes(numel: int) -> int:
    """Of a float32 gradient; 0 where it saves nothing."""
    length = 4 + kernels.ternary_bytes(numel)
    return length if length <= most_room(numel) else 0
