"""Which rank adds up which part of a bucket's gradients: the same on all ranks, whichever gradients there are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from ..compressors import Slot


class Span(NamedTuple):
    """Where a flattened gradient lies in its bucket."""

    offset: int
    numel: int
    extent: int  # elements of the bucket


class Piece(NamedTuple):
    """The elements from `start` to `stop` of a flattened gradient."""

    part: int  # its number among those that are exchanged
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


def spans_of(buckets: Sequence[Sequence[int]], slots: Sequence[Slot]) -> dict[int, Span]:
    """Where the gradients that are compressed lie in their buckets, by index: one after the other, in its order."""
    spans = {}
    for bucket in buckets:
        members = [slots[index] for index in sorted(bucket) if index < len(slots) and slots[index].parameter.compressed]
        extent, offset = sum(slot.parameter.numel for slot in members), 0
        for slot in members:
            spans[slot.parameter.index] = Span(offset, slot.parameter.numel, extent)
            offset += slot.parameter.numel
    return spans


@functools.lru_cache(maxsize=1024)
def regions(spans: tuple[Span, ...], alignment: int, size: int) -> tuple[tuple[Piece, ...], ...]:
    """For each of `size` ranks the pieces that it owns, in order.

    A bucket is cut into as many regions of equal work as there are ranks, gradients only at multiples of `alignment`.
    Where depends on the places in the bucket alone, so that an owner stays one when other gradients are not there.
    """
    owned: list[list[Piece]] = [[] for _ in range(size)]
    for part, (offset, numel, extent) in enumerate(spans):
        owner = offset * size // max(extent, 1)
        start = 0
        while start < numel:
            stop = min(_border(owner + 1, offset, extent, alignment, size), numel) if owner + 1 < size else numel
            if stop > start:
                owned[owner].append(Piece(part, start, stop))
                start = stop
            owner += 1
    return tuple(map(tuple, owned))


def _border(owner: int, offset: int, extent: int, alignment: int, size: int) -> int:
    """Where in a gradient at `offset` the region of `owner` starts, which may be before or after it."""
    return (extent * owner // size - offset + alignment // 2) // alignment * alignment


def of_parts(owned: Sequence[Sequence[Piece]], parts: int) -> list[list[tuple[int, Piece]]]:
    """For each gradient its pieces with their owners, in order."""
    pieces: list[list[tuple[int, Piece]]] = [[] for _ in range(parts)]
    for owner, of_owner in enumerate(owned):
        for piece in of_owner:
            pieces[piece.part].append((owner, piece))
    return pieces
