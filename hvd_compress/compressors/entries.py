"""Scattering sparse gradients, by the rule of Ok-Topk (Li and Hoefler, PPoPP 2022, arXiv 2201.07598).

Entries go to the owners of their pieces, who add them and send on those of the sum that are among its largest on all
ranks together: all that are no smaller than a threshold, which all ranks know. What an owner does not send it keeps,
and adds to the next sum (Ok-Topk leaves it to the senders instead).

Values of fewer than 32 bits are rounded to the nearest of their levels, which is never farther from them than 0 is: no
residual grows by it, as one could by rounding at random. That error feedback stays sound with values so compressed,
beside top-k, is shown by Basu et al. (NeurIPS 2019, arXiv 1906.02367).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import kernels, wire
from ..memory import CUT, RESIDUALS, SPARE, THRESHOLDS, added, key, owned_key
from .codec import Common, ScatterCodec
from .frames import decode_dense
from .slot import Slot

_MEASURED_EVERY = 64  # steps; in between the threshold is steered by how many entries there were
_FEW, _MANY = 4 / 5, 5 / 4  # of the wanted entries, beyond which the threshold changes
_OF_SUM = 2  # times the entries of a rank that owners send of the sum: by as many, 64 ranks learn more slowly
_MOST = 4  # times the wanted entries that an owner sends at most
_SPARE = 8  # entries that it may send besides, where there are hardly any
_EXACT, _VALUE_BITS = 32, (32, 8, 4)


class EntriesCodec(ScatterCodec):
    """A codec whose payloads are entries, which can be cut anywhere: laid out as kernels/sparse.py says where values
    have 32 bits, else as kernels/narrow.py."""

    alignment = 1
    varying = True
    value_bits: int  # an option

    def wanted(self, slot: Slot) -> int:
        """Entries that a rank sends of this gradient."""
        raise NotImplementedError

    def wanted_of_sum(self, slot: Slot) -> int:
        """Entries that owners send together of the sum over the ranks, in which more are large than on any of them.

        More than a rank sends only up to half of the elements: there all of them would hardly be more bytes.
        """
        wanted = self.wanted(slot)
        return max(wanted, min(_OF_SUM * wanted, slot.parameter.numel // 2))

    @abc.abstractmethod
    def selected(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        """As `frame`, where values have 32 bits."""

    def check_value_bits(self) -> None:
        if self.value_bits not in _VALUE_BITS:
            raise ValueError(f"value_bits must be one of {', '.join(map(str, _VALUE_BITS))}: {self.value_bits!r}")

    def entry_bytes(self, numel: int, entries: int) -> int:
        """Of a payload with so many entries of `numel` elements."""
        if self.value_bits == _EXACT:
            return kernels.sparse_bytes(numel, entries)
        return kernels.narrow_bytes(numel, entries, self.value_bits)

    def frame(self, slot: Slot, gradient: Tensor, common: Common | None) -> wire.Frame:
        frame = self.selected(slot, gradient, common)
        if frame.finite and not frame.dense:
            frame.payload = self._rounded(frame.payload, frame.numel, slot.memory.proposed(slot.name))
        return frame

    def add(self, slot: Slot, payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
        kernel = kernels.of(out)
        if self.value_bits == _EXACT:
            return float(kernel.sparse_sum(payloads, divisor, out))
        return float(kernel.narrow_sum(payloads, self.value_bits, divisor, out))

    def cut(
        self, slot: Slot, gradient: Tensor, cuts: Sequence[tuple[int, int]], common: Common | None
    ) -> list[Tensor | None]:
        frame = self.selected(slot, gradient, common)
        if not frame.finite:
            return [None] * len(cuts)
        values, positions = _entries(frame)
        borders = np.searchsorted(positions, [*(start for start, _ in cuts), frame.numel])
        kept = slot.memory.proposed(slot.name)
        return [
            self._rounded(
                _packed(values[first:end], positions[first:end] - start, stop - start), stop - start, kept[start:stop]
            )
            for first, end, (start, stop) in zip(borders, borders[1:], cuts)
        ]

    def piece_bytes(self, slot: Slot, numel: int, *, back: bool) -> int:
        wanted = self.wanted_of_sum(slot) if back else self.wanted(slot)
        return self.entry_bytes(numel, _share(wanted, slot, numel))

    def give_back(self, slot: Slot, total: Tensor, start: int, common: Common | None) -> Tensor | None:
        name, numel = owned_key(slot.name, start), total.numel()
        wanted = _share(self.wanted_of_sum(slot), slot, numel)
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
        return self._rounded(payload[:encoded], numel, kept)

    def held_scattered(self, slot: Slot) -> dict[str, int]:
        owed = 4 * slot.parameter.numel // slot.step.size
        return added([self.held(slot), {RESIDUALS: owed, THRESHOLDS: 4, SPARE: owed}])

    def take_back(self, slot: Slot, payload: Tensor, common: Common | None, divisor: float, out: Tensor) -> float:
        return self.add(slot, [payload], divisor, out)

    def learn(self, slot: Slot, payloads: Sequence[Tensor], numels: Sequence[int]) -> None:
        """Measure the threshold where owners have sent their largest, or where there were too many; else steer it."""
        wanted, threshold = self.wanted_of_sum(slot), _threshold(slot)
        count = sum(self._count(payload, numel) for payload, numel in zip(payloads, numels))
        if threshold is None or count > _MANY * wanted:
            found = [self._values(payload, numel) for payload, numel in zip(payloads, numels)]
            magnitudes = np.abs(np.concatenate(found))
            threshold = float(np.partition(magnitudes, -min(wanted, count))[-min(wanted, count)])
        elif count < _FEW * wanted:
            threshold *= math.sqrt(max(count, 1) / wanted)
        else:
            return
        slot.memory.propose(key(slot.name, CUT), torch.tensor([threshold]))

    def _rounded(self, payload: Tensor, numel: int, kept: Tensor) -> Tensor:
        """The payload that is sent for one with values of 32 bits.

        `kept`, float32 [numel], where they come from, gets back what rounding loses.
        """
        if self.value_bits == _EXACT:
            return payload
        narrow: Tensor = kernels.of(kept).narrow_encode(payload, numel, self.value_bits, kept)
        return narrow

    def _count(self, payload: Tensor, numel: int) -> int:
        if self.value_bits == _EXACT:
            return _count(payload, numel)
        return int.from_bytes(payload[:4].numpy().tobytes(), "little")

    def _values(self, payload: Tensor, numel: int) -> np.ndarray:
        if self.value_bits == _EXACT:
            return _values(payload, numel)
        values: Tensor = kernels.of(payload).narrow_decode(payload, numel, self.value_bits)[0]
        return values.numpy()


def _share(wanted: int, slot: Slot, numel: int) -> int:
    """Of the entries of a gradient those of a piece of `numel` elements."""
    return min(math.ceil(wanted * numel / slot.parameter.numel), numel)


def _threshold(slot: Slot) -> float | None:
    """From what magnitude on owners send; None where they send their largest, so that it can be measured."""
    known = slot.memory.residuals.get(key(slot.name, CUT))
    threshold = 0.0 if known is None or slot.step.number % _MEASURED_EVERY == 0 else float(known)
    return threshold or None


def _entries(frame: wire.Frame) -> tuple[np.ndarray, np.ndarray]:
    """Values, float32, and positions, int64, of what a frame holds."""
    if frame.dense:
        dense = decode_dense(frame.payload, frame.dtype, frame.numel)
        return dense.numpy(), np.arange(frame.numel)
    positions = kernels.of(frame.payload).sparse_positions(frame.payload, frame.numel).numpy()
    return _values(frame.payload, frame.numel), positions


def _count(payload: Tensor, numel: int) -> int:
    return (payload.numel() - kernels.sparse_bytes(numel, 0)) // 6


def _values(payload: Tensor, numel: int) -> np.ndarray:
    start = kernels.sparse_bytes(numel, 0)
    return payload.numpy()[start : start + 4 * _count(payload, numel)].view(np.float32)


def _packed(values: np.ndarray, positions: np.ndarray, numel: int) -> Tensor:
    """As kernels.pack_sparse, by numpy, which is faster where there are few."""
    chunks = kernels.sparse_bytes(numel, 0) // 4
    counts = np.bincount(positions >> 16, minlength=chunks) if chunks > 1 else np.array([len(positions)])
    parts = (counts.astype("<u4"), values, (positions & 0xFFFF).astype("<u2"))
    return torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts]))
