"""Counter-based random bits: element i of a stream depends on the stream's key and on i alone, on every device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

RANDOM_BITS = 24  # of each element: as many as a float32 holds exactly
OPPOSITE = (1 << RANDOM_BITS) - 1  # by exclusive or with it, random bits become their opposites

_MASK64 = (1 << 64) - 1


def _mix64(value: int) -> int:
    """Finalizer of SplitMix64 (Steele et al., OOPSLA 2014): neighbouring inputs give unrelated outputs."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


_mix64_of_part = functools.lru_cache(maxsize=1 << 14)(_mix64)  # seeds, parameters and ranks come again in every step


def stream_key(*identity: int) -> int:
    """64-bit key of the stream that `identity` names, such as (seed, parameter, step, rank)."""
    key = 0
    for part in identity:
        key = _mix64(key ^ _mix64_of_part(part & _MASK64))
    return key


def key_at(key: int, start: int) -> int:
    """Key of the stream that begins at element `start` of that of `key`."""
    return (key & ~0xFFFFFFFF) | ((key + start) & 0xFFFFFFFF)


def _signed32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)  # int32 shifts keep the sign: clear it


def random_bits(numel: int, key: int, device: torch.device | str = "cpu", opposite: bool = False) -> Tensor:
    """Uniform integers in [0, 2**24), int32 [numel]; with `opposite` what each lacks of the largest.

    Two ranks that round numbers up by these and by those err in opposite directions as often as can be, and each of
    them as it would by itself (antithetic variates).

    A 32-bit two-multiply hash of the counter (the shifts and multipliers of Wellons' lowbias32); one half of the key
    offsets the counter, the other is added between the rounds, so that two keys are not shifts of one sequence.
    """
    x = torch.arange(numel, dtype=torch.int64, device=device).add_(key & 0xFFFFFFFF).to(torch.int32)
    x ^= _shift_right(x, 16)
    x *= _signed32(0x7FEB352D)
    x += _signed32(key >> 32)
    x ^= _shift_right(x, 15)
    x *= _signed32(0x846CA68B)
    x ^= _shift_right(x, 16)
    x = _shift_right(x, 32 - RANDOM_BITS)
    return x ^ OPPOSITE if opposite else x
