"""Narrow sparse payloads: values of 8 or 4 bits, positions in the code of Elias and Fano."""

from __future__ import annotations

import pytest
import torch

from hvd_compress import kernels
from hvd_compress.kernels import reference
from hvd_compress.kernels.narrow import narrow_bytes
from hvd_compress.kernels.sparse import pack_sparse

from .drive import bits, random

widths = pytest.mark.parametrize("width", [8, 4])
NUMELS = (1, 2, 7, 64, 1000, 65_535, 65_536, 65_537, 150_000)
HUGE = torch.finfo(torch.float32).max
EXAMPLE = [3, 0, 0, 0, 0, 0, 0, 0x3F, 0b01000101, 0b00011001, 0xE7, 0x00]
FLAWS = {  # of the example: bytes, and what they become
    "an entry more": {0: 4},
    "far more entries than elements": {3: 255},
    "a step that is infinite": {6: 0x80, 7: 0x7F},
    "a step that is no number": {6: 0xC0, 7: 0x7F},
    "a step below 0": {7: 0xBF},
    "a position more": {8: 0b01000111},
    "a position less": {8: 0b01000001},
    "a position twice": {8: 0b01000011, 9: 0b00010101},
    "positions that descend": {8: 0b01000011, 9: 0b00010110},
    "a position past the end": {8: 0b10000101},
    "a number of steps that is none": {10: 0xE8},
}


def entries(numel: int, count: int, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and where they are."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(numel, generator=generator)[:count].sort().values
    return random(count, seed=seed, scale=scale).clamp(-HUGE, HUGE), positions


def test_bytes_of_an_example_in_four_bits(kernel):
    # 3 entries of 20 elements: 2 low bits of 1, 6 and 17 (01, 10, 01), their upper parts 0, 1 and 4 at bits 0, 2 and 6.
    # A step is 3.5 / 7; -1.2 is nearest to -2 steps, 0.1 to none.
    exact = pack_sparse(torch.tensor([3.5, -1.2, 0.1]), torch.tensor([1, 6, 17]), 20)
    kept = torch.zeros(20)
    payload = kernel.narrow_encode(exact, 20, 4, kept)
    assert payload.tolist() == EXAMPLE
    values, positions = kernel.narrow_decode(payload, 20, 4)
    assert values.tolist() == [3.5, -1.0, 0.0]
    assert positions.tolist() == [1, 6, 17]
    left = {1: 0.0, 6: -1.2 + 1.0, 17: 0.1}
    assert kept.tolist() == pytest.approx([left.get(i, 0.0) for i in range(20)])


def test_bytes_of_an_example_in_eight_bits(kernel):
    # A step is 1: halves go to the even number. Of 4 entries among 20 elements 2 bits of a position are low ones.
    exact = pack_sparse(torch.tensor([127.0, -1.4, 0.5, -2.5]), torch.tensor([1, 6, 17, 18]), 20)
    kept = torch.zeros(20)
    payload = kernel.narrow_encode(exact, 20, 8, kept)
    assert payload.tolist() == [4, 0, 0, 0, 0, 0, 0x80, 0x3F, 0b11000101, 0b10011001, 127, 255, 0, 254]
    assert kept[[1, 6, 17, 18]].tolist() == pytest.approx([0.0, -0.4, 0.5, -0.5])


@pytest.mark.parametrize(
    ("numel", "count", "width", "expected"),
    [
        (0, 0, 8, 4),
        (100, 0, 4, 4),
        (1, 1, 8, 4 + 4 + 1 + 0 + 1),
        (1_000_000, 10_000, 8, 4 + 628 + (10_000 + 15_624 + 7) // 8 + 7_500 + 10_000),  # 17.1 bits an entry
        (1_000_000, 10_000, 4, 4 + 628 + (10_000 + 15_624 + 7) // 8 + 7_500 + 5_000),  # 13.1
        (1_000_000, 1_000, 8, 20.504 * 1_000 / 8),
    ],
)
def test_how_long_payloads_are(numel, count, width, expected):
    assert narrow_bytes(numel, count, width) == expected


@widths
def test_no_frame_is_longer_than_that_of_float_values(width):
    for numel in (1, 2, 20, 100, 5000, 65_536, 70_000):
        for count in {*range(min(numel, 70)), numel // 20, numel // 2, numel}:
            narrow, exact = narrow_bytes(numel, count, width), kernels.sparse_bytes(numel, count)
            assert narrow + -narrow % 4 <= exact + -exact % 4, (numel, count)


@widths
@pytest.mark.parametrize("scale", [1.0, 1e36, 1e38, 1e-36, 1e-38, 1e-42])
def test_the_bytes_are_those_of_the_reference_and_nothing_is_lost(kernel, width, scale):
    for numel in NUMELS:
        for count in {0, 1, min(65, numel), numel // 100, numel // 10, numel}:
            values, positions = entries(numel, count, seed=numel, scale=scale)
            exact, kept, wanted = pack_sparse(values, positions, numel), torch.zeros(numel), torch.zeros(numel)
            payload = kernel.narrow_encode(exact, numel, width, kept)
            assert bits(payload) == bits(reference.narrow_encode(exact, numel, width, wanted))
            assert bits(kept) == bits(wanted)
            assert payload.numel() == narrow_bytes(numel, count, width)
            read, places = kernel.narrow_decode(payload, numel, width)
            assert torch.equal(places, positions)
            assert torch.equal(read + kept[positions], values)
            assert bool(read.isfinite().all())


@widths
def test_sums_are_those_of_the_reference(kernel, width):
    for numel in NUMELS:
        payloads = []
        for rank in range(5):
            values, positions = entries(numel, numel // (rank + 1), seed=rank)
            exact = pack_sparse(values, positions, numel)
            payloads.append(reference.narrow_encode(exact, numel, width, torch.zeros(numel)))
        out, wanted = torch.full((numel,), torch.nan), torch.empty(numel)
        bound = kernel.narrow_sum(payloads, width, 3.0, out)
        assert reference.narrow_sum(payloads, width, 3.0, wanted) <= bound < float("inf")
        assert bits(out) == bits(wanted)


def test_zeros_stay_zeros_and_what_is_too_small_for_a_step_waits(kernel):
    for value in (0.0, -0.0, 2.0**-149, 2.0**-127):
        exact, kept = pack_sparse(torch.full((70,), value), torch.arange(70), 100), torch.zeros(100)
        read, _ = kernel.narrow_decode(kernel.narrow_encode(exact, 100, 4, kept), 100, 4)
        assert torch.equal(read, torch.zeros(70))
        assert torch.equal(kept[:70], torch.full((70,), value))


def test_the_largest_float_does_not_overflow(kernel):
    for width in (8, 4):
        exact, kept = pack_sparse(torch.tensor([HUGE, -HUGE]), torch.tensor([0, 9]), 10), torch.zeros(10)
        payload, out = kernel.narrow_encode(exact, 10, width, kept), torch.empty(10)
        assert kernel.narrow_sum([payload], width, 1.0, out) < float("inf")
        assert torch.equal(out[[0, 9]] + kept[[0, 9]], torch.tensor([HUGE, -HUGE]))


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("rank", [0, 2])
def test_what_no_encoder_writes_is_refused(kernel, flaw, rank):
    payloads = [torch.tensor(EXAMPLE, dtype=torch.uint8) for _ in range(3)]
    for place, value in FLAWS[flaw].items():
        payloads[rank][place] = value
    with pytest.raises(kernels.PayloadError) as caught:
        kernel.narrow_sum(payloads, 4, 1.0, torch.empty(20))
    assert caught.value.rank == rank
    with pytest.raises(ValueError, match=r"positions|entries|steps"):
        kernel.narrow_decode(payloads[rank], 20, 4)


def test_another_length_is_refused(kernel):
    whole = torch.tensor([*EXAMPLE, 0], dtype=torch.uint8)
    for length in {*range(14)} - {12}:
        with pytest.raises(kernels.PayloadError):
            kernel.narrow_sum([whole[:length]], 4, 1.0, torch.empty(20))
