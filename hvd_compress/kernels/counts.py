"""Whole numbers from -most to most in as few bits as tell them apart, such as sums of ternary numbers.

A number n has the code n + most. Layout: as of the codes in quantise.py, with 2 to 16 bits.
"""

from __future__ import annotations

from .quantise import QUANTISED_BLOCK

MOST_RANKS = (1 << 15) - 1  # sums of so many ternary numbers fit in 16 bits


def count_bits(most: int) -> int:
    """Bits of one of 2 * most + 1 numbers.

    >>> count_bits(8), count_bits(64), count_bits(1024)
    (5, 8, 12)
    """
    return max((2 * most).bit_length(), 2)


def count_bytes(numel: int, most: int) -> int:
    return -(-numel // QUANTISED_BLOCK) * QUANTISED_BLOCK // 8 * count_bits(most)
