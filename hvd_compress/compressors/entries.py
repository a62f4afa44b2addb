"""Scattering sparse gradients, by the rule of Ok-Topk (Li and Hoefler, PPoPP 2022, arXiv 2201.07598).

Entries go to the owners of their pieces, who add them and send on those of the sum that are among its largest on all
ranks together: all that are no smaller than a threshold, which all ranks know. What an owner does not send it keeps,
and adds to the next sum (Ok-Topk leaves it to the senders instead).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import CUT, RESIDUALS, SPARE, THRESHOLDS, added, key, owned_key
from .base import Common, ScatterCodec, Slot, decode_dense

_MEASURED_EVERY = 64  # steps; in between the threshold is steered by how many entries there were
_FEW, _MANY = 4 / 5, 5 / 4  # of the wanted entries, beyond which the threshold changes
_MOST = 4  # times the wanted entries that an owner sends at most
_SPARE = 8  # entries that it may send besides, where there are hardly any


class EntriesCodec(ScatterCodec):
    """A codec whose payloads are the layout of kernels/sparse.py: entries, which can be cut anywhere."""

    alignment = 1
    varying = True

    def wanted(self, slot: Slot) -> int:
        """Entries that a rank sends of this gradient, and owners together of its sum."""
        raise NotImplementedError

    def cut(
        self, slot: Slot, gradient: Tensor, cuts: Sequence[tuple[int, int]], common: Common | None
    ) -> list[Tensor | None]:
        frame = self.frame(slot, gradient, common)
        if not frame.finite:
            return [None] * len(cuts)
        values, positions = _entries(frame)
        borders = np.searchsorted(positions, [*(start for start, _ in cuts), frame.numel])
        return [
            _packed(values[first:end], positions[first:end] - start, stop - start)
            for first, end, (start, stop) in zip(borders, borders[1:], cuts)
        ]

    def piece_bytes(self, slot: Slot, numel: int, *, back: bool) -> int:
        return kernels.sparse_bytes(numel, self._wanted_of(slot, numel))

    def give_back(self, slot: Slot, total: Tensor, start: int, common: Common | None) -> Tensor | None:
        name, numel, wanted = owned_key(slot.name, start), total.numel(), self._wanted_of(slot, total.numel())
        kernel, kept = kernels.of(total), slot.memory.room(name, total)
        owed, threshold = slot.memory.residual(name, total.device), _threshold(slot)
        encoded = kernels.TOO_LARGE
        if threshold is not None:
            most = min(_MOST * wanted + _SPARE, numel)
            payload = torch.empty(kernels.sparse_bytes(numel, most), dtype=torch.uint8)
            encoded = kernel.threshold_encode(total, owed, kept, threshold, payload)
        else:
            most = min(math.ceil(_MANY * wanted) + _SPARE, numel)
        if encoded == kernels.TOO_LARGE:
            payload = torch.empty(kernels.sparse_bytes(numel, most), dtype=torch.uint8)
            encoded = kernel.topk_encode(total, owed, kept, most, payload)
        if encoded == kernels.NOT_FINITE:
            return None
        slot.memory.propose(name, kept)
        return payload[:encoded]

    def held_scattered(self, slot: Slot) -> dict[str, int]:
        owed = 4 * slot.shape.numel() // slot.size
        return added([self.held(slot), {RESIDUALS: owed, THRESHOLDS: 4, SPARE: owed}])

    def take_back(self, slot: Slot, payload: Tensor, common: Common | None, divisor: float, out: Tensor) -> float:
        return float(kernels.of(out).sparse_sum([payload], divisor, out))

    def learn(self, slot: Slot, payloads: Sequence[Tensor], numels: Sequence[int]) -> None:
        """Measure the threshold where owners have sent their largest, or where there were too many; else steer it."""
        wanted, threshold = self.wanted(slot), _threshold(slot)
        counts = [(p.numel() - kernels.sparse_bytes(numel, 0)) // 6 for p, numel in zip(payloads, numels)]
        count = sum(counts)
        if threshold is None or count > _MANY * wanted:
            found = [_values(p, numel, count) for p, numel, count in zip(payloads, numels, counts)]
            magnitudes = np.abs(np.concatenate(found))
            threshold = float(np.partition(magnitudes, -min(wanted, count))[-min(wanted, count)])
        elif count < _FEW * wanted:
            threshold *= math.sqrt(max(count, 1) / wanted)
        else:
            return
        slot.memory.propose(key(slot.name, CUT), torch.tensor([threshold]))

    def _wanted_of(self, slot: Slot, numel: int) -> int:
        """Of a piece of so many elements."""
        return min(math.ceil(self.wanted(slot) * numel / slot.shape.numel()), numel)


def _threshold(slot: Slot) -> float | None:
    """From what magnitude on owners send; None where they send their largest, so that it can be measured."""
    known = slot.memory.residuals.get(key(slot.name, CUT))
    threshold = 0.0 if known is None or slot.step % _MEASURED_EVERY == 0 else float(known)
    return threshold or None


def _entries(frame: wire.Frame) -> tuple[np.ndarray, np.ndarray]:
    """Values, float32, and positions, int64, of what a frame holds."""
    if frame.dense:
        dense = decode_dense(frame.payload, frame.dtype, frame.numel)
        return dense.numpy(), np.arange(frame.numel)
    positions = kernels.of(frame.payload).sparse_positions(frame.payload, frame.numel).numpy()
    return _values(frame.payload, frame.numel, len(positions)), positions


def _values(payload: Tensor, numel: int, count: int) -> np.ndarray:
    start = kernels.sparse_bytes(numel, 0)
    return payload.numpy()[start : start + 4 * count].view(np.float32)


def _packed(values: np.ndarray, positions: np.ndarray, numel: int) -> Tensor:
    """As kernels.pack_sparse, by numpy, which is faster where there are few."""
    chunks = kernels.sparse_bytes(numel, 0) // 4
    counts = np.bincount(positions >> 16, minlength=chunks) if chunks > 1 else np.array([len(positions)])
    parts = (counts.astype("<u4"), values, (positions & 0xFFFF).astype("<u2"))
    return torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts]))
