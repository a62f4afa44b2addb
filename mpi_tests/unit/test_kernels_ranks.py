"""Sums of more ranks than are added at once, over the ends of the blocks that are: the bits of the torch operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvd_compress import kernels
from hvd_compress.kernels import native, reference

from .drive import bits, random
from .test_native import KEY, LEVELS, summed

NUMELS = (1, 120, 2047, 2048, 2049, 4100)
RANKS = (1, 2, 3, 4, 5, 8, 9, 33)


@pytest.fixture(params=LEVELS or ["none"], autouse=True)
def level(request):
    before = kernels.in_use()
    assert kernels.use(request.param) == request.param
    yield
    kernels.use(before)


def anything(length: int, floats: int, rank: int) -> bytes:
    """`floats` positive float32, then every code that bytes can hold."""
    generator = np.random.default_rng([length, rank])
    start = generator.random(floats, np.float32) * 10.0 ** (rank % 7)
    return start.tobytes() + generator.bytes(length - start.nbytes)


@pytest.mark.parametrize("numel", NUMELS)
def test_ternary_codes(numel):
    length = 4 + kernels.ternary_bytes(numel)
    payloads = [anything(length, 1, rank) for rank in range(max(RANKS))]
    clean = [bytes(length), *(part[:4] + bytes(byte & 0x55 for byte in part[4:]) for part in payloads[1:])]
    for ranks in RANKS:
        for divisor in (1.0, 3.0, float(ranks)):
            summed("ternary_sum", payloads[:ranks], numel, divisor)
            summed("ternary_sum", clean[:ranks], numel, divisor)


@pytest.mark.parametrize("bucket", [8, 24, 256, 512, 1000])
@pytest.mark.parametrize("code_bits", range(1, 9))
def test_quantised_codes(code_bits, bucket):
    for numel in NUMELS:
        length, norms = kernels.quantised_bytes(numel, code_bits, bucket), -(-numel // bucket)
        payloads = [anything(length, norms, rank) for rank in range(9)]
        for ranks in (1, 5, 9):
            summed("quantise_sum", payloads[:ranks], numel, 3.0, code_bits, bucket)


@pytest.mark.parametrize("numel", NUMELS)
def test_bfloats(numel):
    payloads = [bits(random(numel, seed=rank).bfloat16()) for rank in range(max(RANKS))]
    for ranks in RANKS:
        summed("bfloat_sum", payloads[:ranks], numel, 3.0)


def pruned(numel: int, threshold: float, seed: int) -> bytes:
    room = torch.empty(4 + kernels.ternary_bytes(numel) + 4 * numel, dtype=torch.uint8)
    return bits(room[: reference.prune_encode(random(numel, seed=seed), threshold, KEY + seed, room)].clone())


@pytest.mark.parametrize("numel", NUMELS)
def test_pruned(numel):
    """Of few, some and all elements that are sent as they are."""
    payloads = [pruned(numel, (3.0, 0.5, 0.0)[rank % 3], rank) for rank in range(max(RANKS))]
    for ranks in RANKS:
        summed("prune_sum", payloads[:ranks], numel, 3.0)


@pytest.mark.parametrize("wrong", [0, 4, 7])
def test_the_first_rank_with_a_wrong_number_of_values_is_named(wrong):
    """Though what a later rank lacks is seen before what the first has too many."""
    payloads = [torch.frombuffer(bytearray(pruned(5000, 0.5, rank)), dtype=torch.uint8) for rank in range(9)]
    payloads[wrong] = torch.cat([payloads[wrong], torch.zeros(4, dtype=torch.uint8)])
    payloads[8] = payloads[8][: 4 + kernels.ternary_bytes(5000)].clone()
    for module in (native, reference):
        with pytest.raises(kernels.PayloadError) as raised:
            module.prune_sum(payloads, 1.0, torch.empty(5000))
        assert raised.value.rank == wrong


def test_codes_past_the_end_mean_nothing():
    """What stands after the last of 100 elements, in a block of 128, announces no values."""
    payload = bytearray(pruned(100, 0.5, 1))
    payload[4 + 4 * 7 + 3] |= 0xC0  # the last row of the last lane
    summed("prune_sum", [bytes(payload)] * 5, 100, 1.0)
