"""A codec as a newcomer writes it, outside of the package: docs/adding.md shows it, and test_adding.py uses it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hvd_compress import wire
from hvd_compress.compressors import ScatterCodec, Slot
from hvd_compress.compressors.codec import Common
from hvd_compress.compressors.footprint import Sent
from hvd_compress.compressors.gradients import flat32, max_abs


@dataclass(frozen=True)
class SignCompressor(ScatterCodec):
    """The sign of each element times `scale` and the mean magnitude: one bit each. No error feedback: it is a toy."""

    scale: float = 1.0

    algorithm = 200  # in the frames
    alignment = 8  # elements, between which a gradient may be cut

    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        return self.framed(slot, gradient, self._packed(flat32(gradient)), rate=1.0)

    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        out.zero_()
        for payload in payloads:
            out += _unpacked(payload, out.numel())
        out /= divisor
        return max_abs(out)

    def sent(self, slot: Slot) -> Sent:
        return Sent(gathered=wire.frame_bytes(self.piece_bytes(slot, slot.parameter.numel, back=False)))

    # Scattering: each piece is encoded as a gradient is, and its sum again.

    def cut(
        self, slot: Slot, gradient: Tensor, cuts: Sequence[tuple[int, int]], common: Common | None
    ) -> list[Tensor | None]:
        values = flat32(gradient)
        return [self._packed(values[start:stop]) for start, stop in cuts]

    def piece_bytes(self, slot: Slot, numel: int, *, back: bool) -> int:
        return 4 + (numel + 7) // 8

    def give_back(self, slot: Slot, total: Tensor, start: int, common: Common | None) -> Tensor | None:
        return self._packed(total)

    def take_back(self, slot: Slot, payload: Tensor, common: Common | None, divisor: float, out: Tensor) -> float:
        return self.add(slot, [payload], divisor, out)

    def _packed(self, values: Tensor) -> Tensor | None:
        """A float32, then a bit an element; None for what is not finite."""
        if not max_abs(values) < math.inf:
            return None
        mean = np.float32(self.scale * float(values.abs().mean())) if values.numel() else np.float32(0)
        bits = np.packbits(values.numpy() >= 0)
        return torch.from_numpy(np.concatenate([mean[None].view(np.uint8), bits]))


def _unpacked(payload: Tensor, numel: int) -> Tensor:
    octets = payload.numpy()
    signs = np.unpackbits(octets[4:], count=numel).astype(np.float32) * 2 - 1
    return torch.from_numpy(signs * octets[:4].view(np.float32))
