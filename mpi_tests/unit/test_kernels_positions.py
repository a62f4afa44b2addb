"""Ascending positions in the code of Elias and Fano."""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress.kernels import reference
from hvd_compress.kernels.positions import position_bytes

EXAMPLE = [0b01000101, 0b00011001]
FLAWS = {  # of the example: bytes, and what they become
    "a position more": {0: 0b01000111},
    "a position less": {0: 0b01000001},
    "a position twice": {0: 0b01000011, 1: 0b00010101},
    "positions that descend": {0: 0b01000011, 1: 0b00010110},
    "a position past the end": {0: 0b10000101},
}


def some(numel: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def test_bytes_of_an_example(kernel):
    # Of 3 among 20, 2 bits are low ones: of 1, 6 and 17 these are 01, 10 and 01; their upper parts 0, 1 and 4 are at
    # bits 0, 2 and 6.
    packed = kernel.positions_encode(torch.tensor([1, 6, 17]), 20)
    assert packed.tolist() == EXAMPLE
    assert kernel.positions_decode(packed, 20, 3).tolist() == [1, 6, 17]


@pytest.mark.parametrize("numel", [1, 2, 7, 64, 1000, 65_537, 150_000])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.3, 1.0])
def test_positions_come_back_and_all_kernels_write_the_same(kernel, numel, part):
    positions = some(numel, math.ceil(part * numel), seed=numel)
    packed = kernel.positions_encode(positions, numel)
    assert packed.numel() == position_bytes(numel, positions.numel())
    assert torch.equal(packed, reference.positions_encode(positions, numel))
    assert torch.equal(kernel.positions_decode(packed, numel, positions.numel()), positions)


@pytest.mark.parametrize("part", [0.001, 0.01, 0.1])
def test_they_take_little_more_than_the_least_possible(part):
    numel, entries = 1_000_000, int(part * 1_000_000)
    least = (math.lgamma(numel + 1) - math.lgamma(entries + 1) - math.lgamma(numel - entries + 1)) / math.log(2)
    assert 8 * position_bytes(numel, entries) < least + 0.65 * entries
    assert 8 * position_bytes(numel, entries) <= (2 + math.log2(1 / part)) * entries + 16


def test_positions_far_out_need_no_more_than_their_bits(kernel):
    numel = 1 << 33
    positions = torch.tensor([0, 5, 1 << 31, (1 << 32) + 7, numel - 1])
    assert torch.equal(kernel.positions_decode(kernel.positions_encode(positions, numel), numel, 5), positions)


@pytest.mark.parametrize("flaw", FLAWS)
def test_what_nobody_would_write_is_an_error(kernel, flaw):
    packed = torch.tensor(EXAMPLE, dtype=torch.uint8)
    for place, value in FLAWS[flaw].items():
        packed[place] = value
    with pytest.raises(ValueError, match="positions"):
        kernel.positions_decode(packed, 20, 3)


@pytest.mark.parametrize(("length", "entries"), [(1, 3), (3, 3), (0, 3), (2, 0), (2, 7)])
def test_another_number_of_bytes_is_an_error(kernel, length, entries):
    packed = torch.tensor([*EXAMPLE, 0], dtype=torch.uint8)[:length].clone()
    with pytest.raises(ValueError, match="positions"):
        kernel.positions_decode(packed, 20, entries)
