"""Sparse payloads: exact float32 values at ascending positions.

Layout, little-endian: for each chunk of 65,536 elements its number of entries, uint32; then all values, float32; then
all positions within their chunks, uint16. Six bytes an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 16


def sparse_bytes(numel: int, entries: int) -> int:
    return 4 * -(-numel // _CHUNK) + 6 * entries


def pack_sparse(values: Tensor, positions: Tensor, numel: int) -> Tensor:
    """uint8 [sparse_bytes] of values, float32 [k], at ascending positions, int64 [k], in a tensor of `numel`."""
    counts = torch.bincount(positions // _CHUNK, minlength=-(-numel // _CHUNK)).to(torch.int32)
    low = positions % _CHUNK
    low = torch.where(low >= 1 << 15, low - _CHUNK, low).to(torch.int16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in (counts, values, low)])


def unpack_sparse(packed: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Values, float32 [k], and positions, int64 [k], of uint8 [bytes]. Raises ValueError if the bytes do not fit."""
    chunks = -(-numel // _CHUNK)
    if packed.numel() < 4 * chunks:
        raise ValueError(f"{packed.numel()} bytes are too few for the counts of {chunks} chunks")
    counts = packed[: 4 * chunks].view(torch.int32).to(torch.int64)
    entries = int(counts.sum())
    in_range = bool(((counts >= 0) & (counts <= _CHUNK)).all())
    if not in_range or packed.numel() != sparse_bytes(numel, entries):
        raise ValueError(f"{packed.numel()} bytes do not hold the {entries} entries that are announced")
    values = packed[4 * chunks : 4 * (chunks + entries)].view(torch.float32)
    low = packed[4 * (chunks + entries) :].view(torch.int16).to(torch.int64).bitwise_and_(_CHUNK - 1)
    starts = torch.arange(0, chunks * _CHUNK, _CHUNK, device=packed.device)
    positions = low + torch.repeat_interleave(starts, counts)
    if entries and (int(positions[-1]) >= numel or bool((positions.diff() <= 0).any())):
        raise ValueError("positions are not ascending, or are past the end")
    return values, positions
