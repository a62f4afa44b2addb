"""One rank in turn says for all which entries of a bucket's gradients are sent; these are added up by scatter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..compressors import ScaleComCompressor
from ..compressors.scalecom import Entries, values_of
from ..requests import Broadcast, GroupExchange
from .base import Part
from .regions import Span
from .scatter import Scatter


@dataclass(frozen=True)
class Cyclic:
    """Three rounds: the leader's positions to all, values to the owners of their pieces, and their sums to all."""

    compressor: ScaleComCompressor

    def reduce(self, parts: Sequence[Part]) -> GroupExchange:
        entries = [self.compressor.begin(part.slot, part.gradient) for part in parts]
        packed = [one.packed() for one in entries]
        positions: Tensor = yield Broadcast(torch.cat(packed), entries[0].leader)
        for one, of_one in zip(entries, positions.split([mine.numel() for mine in packed])):
            one.agree(of_one)
        totals = yield from Scatter(self.compressor.carrier, _known(positions, entries)).reduce(_parts(entries))
        return [None if total is None else one.total(total) for one, total in zip(entries, totals)]


def _known(positions: Tensor, entries: Sequence[Entries]) -> int:
    """What tells values for these positions from those for any others; of positions that cannot be, from all."""
    if not all(one.sound for one in entries):
        return -1 - entries[0].slot.step.rank
    packed = positions.cpu()
    return int(kernels.of(packed).crc32(b"", packed))


def _parts(entries: Sequence[Entries]) -> list[Part]:
    """The values, as if they were gradients that make up a bucket."""
    counts = [one.count for one in entries]
    extent, offsets = sum(counts), itertools.accumulate(counts, initial=0)
    spans = [Span(offset, count, extent) for offset, count in zip(offsets, counts)]
    return [Part(values_of(one.slot, one.count), one.values(), span) for one, span in zip(entries, spans)]
