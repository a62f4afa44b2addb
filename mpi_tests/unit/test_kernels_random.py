"""Random bits: fixed for ever, uniform, and unrelated between streams."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hvd_compress.kernels import random_bits, stream_key

GOLDEN_KEYS = [
    ((), 0x0000000000000000),
    ((0,), 0xA706DD2F4D197E6F),
    ((0, 0, 0, 0), 0x15CAA809CF794190),
    ((0, 1, 2, 3), 0x26B0692D82D4C007),
    ((3, 2, 1, 0), 0x3DA8C0E657891D6A),
    ((-1,), 0x5DC20AA7B2A27137),
    ((18446744073709551615, 9223372036854775808), 0xFE868A17994DE62A),
    ((20231, 7, 100000, 1023), 0x8678152842E074BC),
]
GOLDEN_BITS = [
    (0x0000000000000000, [0, 6850960, 13701921, 5501417, 14253662, 6047189]),
    (0x0000000000000001, [6850960, 13701921, 5501417, 14253662, 6047189, 11002835]),
    (0x00000000FFFFFFFF, [6776962, 0, 6850960, 13701921, 5501417, 14253662]),
    (0xFFFFFFFFFFFFFFFF, [8239463, 11725490, 14949813, 5023494, 14180024, 4995288]),
    (0x0123456789ABCDEF, [7344301, 4986949, 12926432, 11232696, 12599072, 12054650]),
    (0x0000000100000000, [8678434, 14370015, 5603522, 15919797, 5575092, 14725840]),
]


def mixed(value: int) -> int:
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return value ^ (value >> 31)


@pytest.mark.parametrize(("identity", "key"), GOLDEN_KEYS)
def test_stream_keys_never_change(identity, key):
    assert stream_key(*identity) == key


@pytest.mark.parametrize(("key", "expected"), GOLDEN_BITS)
def test_random_bits_never_change(key, expected):
    assert random_bits(len(expected), key).tolist() == expected


def test_the_first_key_is_that_of_splitmix64():
    assert mixed(0) == 0xE220A8397B1DCDAF  # as published for seed 0
    assert stream_key(0) == mixed(mixed(0))


@pytest.mark.parametrize("key", [0, 0xFFFFFFFF, 0xFFFFFFF0, 0x80000000, 0x7FFFFFFE, (1 << 64) - 1], ids=hex)
def test_the_counter_wraps_around_at_32_bits(key):
    """The elements after the wrap are those of a stream that starts at 0."""
    count = 40
    drawn = random_bits(count, key).tolist()
    for number in range(count):
        moved = (key & ~0xFFFFFFFF) | ((key + number) & 0xFFFFFFFF)
        assert random_bits(1, moved).tolist() == [drawn[number]]


@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 100_000])
def test_an_element_depends_on_its_place_alone(numel):
    key = stream_key(1, 2, 3)
    assert torch.equal(random_bits(numel, key), random_bits(100_001, key)[:numel])
    assert random_bits(numel, key).dtype == torch.int32


def chi_square(counts: np.ndarray) -> float:
    """How many standard deviations the statistic lies from its mean."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("identity", [(0, 0, 0, 0), (0, 1, 0, 0), (5, 3, 1000, 7)])
@pytest.mark.parametrize("shift", [16, 8, 4, 0])
def test_bits_are_uniform(identity, shift):
    drawn = random_bits(1 << 20, stream_key(*identity)).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1 << 24
    counts = np.bincount((drawn >> shift) & 255, minlength=256)
    assert abs(chi_square(counts)) < 5
    pairs = np.bincount(((drawn[::2] >> shift) & 15) * 16 + ((drawn[1::2] >> shift) & 15), minlength=256)
    assert abs(chi_square(pairs)) < 5


NEIGHBOURS = [
    (a, b)
    for base in ((0, 0, 0, 0), (1, 5, 100, 3))
    for axis in range(4)
    for a, b in [(base, tuple(part + (number == axis) for number, part in enumerate(base)))]
]


@pytest.mark.parametrize(("one", "other"), NEIGHBOURS, ids=str)
@pytest.mark.parametrize("lag", [0, 1, 8, 128])
def test_neighbouring_streams_are_unrelated(one, other, lag):
    """By seed, parameter, step and rank: the noise of ranks must average out."""
    count = 200_000
    a = random_bits(count, stream_key(*one)).double().numpy()
    b = random_bits(count + lag, stream_key(*other)).double().numpy()[lag:]
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / count**0.5
    table = np.bincount((a.astype(np.int64) >> 20) * 16 + (b.astype(np.int64) >> 20), minlength=256)
    assert abs(chi_square(table)) < 5


@pytest.mark.parametrize("lag", [1, 2, 8, 128, 65536])
def test_a_stream_is_unrelated_to_itself_further_on(lag):
    drawn = random_bits(400_000, stream_key(0, 1, 2, 3)).double().numpy()
    assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 5 / 300_000**0.5


@pytest.mark.parametrize("number", range(20))
def test_streams_that_share_the_lower_half_of_their_key_are_unrelated(number):
    """One pair of ranks in four thousand million; by a lag, as many as there are elements."""
    low, count = stream_key(0, 1, 2, 3) & 0xFFFFFFFF, 200_000
    keys = [(stream_key(number, side) & ~0xFFFFFFFF) | low for side in range(2)]
    a, b = (random_bits(count, key).double().numpy() for key in keys)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / count**0.5


def test_no_two_small_identities_share_a_key():
    identities = itertools.chain(
        itertools.product(range(3), range(20), range(20), range(8)), itertools.product(range(30), repeat=2)
    )
    keys = [stream_key(*identity) for identity in identities]
    assert len(set(keys)) == len(keys)
    assert len({key & 0xFFFFFFFF for key in keys}) > len(keys) - 20  # birthdays: 2 are expected


def test_keys_depend_on_the_order_of_their_parts():
    assert len({stream_key(*order) for order in itertools.permutations((0, 1, 2, 3))}) == 24
