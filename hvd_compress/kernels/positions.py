"""Ascending positions in the code of Elias and Fano (Vigna, WSDM 2013, arXiv 1206.4300): about log2(elements / entries)
+ 2 bits each, some half a bit more than the least that any code takes.

Layout, the first bit of a byte its lowest: of entry j, at position p, bit (p >> low) + j of the upper bits is set; then
the `low` lowest bits of one position follow those of the one before. Both parts end with a whole byte.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_bits(numel: int, entries: int) -> int:
    """Of a position, those that are stored as they are: the rest takes no more than two bits an entry."""
    return (numel // entries).bit_length() - 1 if entries else 0


def position_sections(numel: int, entries: int) -> list[int]:
    """Bytes of the upper and of the lower bits."""
    if not entries:
        return [0, 0]
    low = low_bits(numel, entries)
    return [-(-bits // 8) for bits in (entries + (numel - 1 >> low), entries * low)]


def position_bytes(numel: int, entries: int) -> int:
    return sum(position_sections(numel, entries))


def pack_positions(positions: Tensor, numel: int) -> Tensor:
    """uint8 [position_bytes] of ascending positions, int64 [k], below `numel`."""
    entries, positions = positions.numel(), positions.cpu()
    low, upper = low_bits(numel, entries), torch.zeros(8 * position_sections(numel, entries)[0], dtype=torch.bool)
    upper[(positions >> low) + torch.arange(entries)] = True
    return torch.cat((packed_flags(upper), pack_numbers(positions, low)))


def unpack_positions(packed: Tensor, numel: int, entries: int) -> Tensor:
    """Positions, int64 [entries], of uint8 [bytes]. Raises ValueError if the bytes do not fit."""
    if packed.numel() != position_bytes(numel, entries):
        raise ValueError(f"{packed.numel()} bytes do not hold {entries} positions")
    upper, lower = packed.split_with_sizes(position_sections(numel, entries))
    places = torch.nonzero(_flags(upper)).view(-1)
    if places.numel() != entries:
        raise ValueError(f"{places.numel()} positions for {entries} entries")
    low = low_bits(numel, entries)
    positions = (places - torch.arange(entries)) << low | unpack_numbers(lower, entries, low)
    if entries and (int(positions[-1]) >= numel or bool((positions.diff() <= 0).any())):
        raise ValueError("positions are not ascending, or are past the end")
    return positions


def pack_numbers(numbers: Tensor, width: int) -> Tensor:
    """The `width` lowest bits of int64 [k], one after another, uint8."""
    return packed_flags((numbers[:, None] >> torch.arange(width) & 1).view(-1).bool())


def unpack_numbers(packed: Tensor, count: int, width: int) -> Tensor:
    """Int64 [count], of `pack_numbers`."""
    return (_flags(packed)[: count * width].view(count, width).to(torch.int64) << torch.arange(width)).sum(1)


def packed_flags(flags: Tensor) -> Tensor:
    """Bool [k] as bits, uint8."""
    padded = torch.nn.functional.pad(flags, (0, -flags.numel() % 8)).view(-1, 8).to(torch.int64)
    return (padded << torch.arange(8)).sum(1).to(torch.uint8)


def _flags(packed: Tensor) -> Tensor:
    return (packed[:, None].to(torch.int64) >> torch.arange(8) & 1).bool().view(-1)
