"""Narrow sparse payloads: values of 8 or 4 bits, at ascending positions of about log2(elements / entries) + 2 bits.

Layout, little-endian, the first bit of a byte its lowest: the number of entries, uint32; for each block of 64 entries a
step, float32; the positions, as kernels/positions.py lays them out; then, for each value, how many steps it is, in
two's complement, up to a whole byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .positions import pack_numbers, pack_positions, position_bytes, unpack_numbers, unpack_positions

ENTRIES_A_STEP = 64
_HEAD_BYTES = 4
_LARGEST = torch.finfo(torch.float32).max


def _sections(numel: int, entries: int, bits: int) -> list[int]:
    """Bytes of the steps, of the positions, and of the values."""
    return [4 * -(-entries // ENTRIES_A_STEP), position_bytes(numel, entries), -(-entries * bits // 8)]


def narrow_bytes(numel: int, entries: int, bits: int) -> int:
    return _HEAD_BYTES + sum(_sections(numel, entries, bits))


def rounded(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The steps, float32 [blocks], and how many of them are nearest to each of the values, both float32 [k].

    The largest value of a block is 2**(bits - 1) - 1 steps. A step that would be no normal float32 is 0, as all values.
    """
    levels, blocks = 2 ** (bits - 1) - 1, -(-values.numel() // ENTRIES_A_STEP)
    padded = torch.nn.functional.pad(values, (0, blocks * ENTRIES_A_STEP - values.numel()))
    largest = padded.abs().view(blocks, ENTRIES_A_STEP).amax(1) if blocks else values
    steps = (largest / levels).clamp(max=largest_step(bits))
    steps = torch.where(steps < torch.finfo(torch.float32).tiny, 0.0, steps)
    step = _each(steps, values)
    return steps, torch.where(step > 0, (values / step).round().clamp(-levels, levels), 0.0)


def largest_step(bits: int) -> float:
    """Of which the largest number is a finite float32."""
    highest = torch.tensor(_LARGEST) / (2 ** (bits - 1) - 1)
    return float(torch.nextafter(highest, torch.tensor(0.0)))


def _each(steps: Tensor, values: Tensor) -> Tensor:
    """The step of each value."""
    return steps.repeat_interleave(ENTRIES_A_STEP)[: values.numel()]


def pack_narrow(values: Tensor, positions: Tensor, numel: int, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 [narrow_bytes] of finite values, float32 [k], at ascending positions, int64 [k], in a tensor of `numel`;
    and what is read of the values, float32 [k]."""
    entries = values.numel()
    steps, counts = rounded(values, bits)
    head = torch.tensor([entries], dtype=torch.int64).view(torch.uint8)[:_HEAD_BYTES]
    codes = pack_numbers(counts.cpu().to(torch.int64), bits)
    packed = torch.cat((head, steps.cpu().view(torch.uint8), pack_positions(positions, numel), codes))
    return packed, counts * _each(steps, values)


def unpack_narrow(packed: Tensor, numel: int, bits: int) -> tuple[Tensor, Tensor]:
    """Values, float32 [k], and positions, int64 [k], of uint8 [bytes]. Raises ValueError if the bytes do not fit."""
    entries = int.from_bytes(packed[:_HEAD_BYTES].numpy().tobytes(), "little")
    if packed.numel() < _HEAD_BYTES or entries > numel or packed.numel() != narrow_bytes(numel, entries, bits):
        raise ValueError(f"{packed.numel()} bytes do not hold the {entries} entries that are announced")
    steps, packed_positions, codes = packed[_HEAD_BYTES:].split_with_sizes(_sections(numel, entries, bits))
    positions = unpack_positions(packed_positions, numel, entries)
    counts, of_blocks = unpack_numbers(codes, entries, bits), steps.clone().view(torch.float32)
    counts = torch.where(counts >= 1 << bits - 1, counts - (1 << bits), counts)
    if bool((counts == -(1 << bits - 1)).any()) or not bool(((of_blocks >= 0) & (of_blocks <= _LARGEST)).all()):
        raise ValueError("steps or numbers of them that are none")
    return counts.to(torch.float32) * _each(of_blocks, counts), positions
