"""The C++ kernels write the bytes of the torch operations, at every level that this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from hvd_compress import kernels
from hvd_compress.kernels import native, prune, reference
from hvd_compress.kernels.topk import topk_indices

from .drive import bits, random

LEVELS = [level for level in native.LEVELS if native.select(level) == level]
NUMELS = (0, 1, 7, 8, 9, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 513, 1000, 4099, 70_001)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEY = kernels.stream_key(3, 1, 4, 1)
CANARY = 0xA5

pytestmark = pytest.mark.skipif(not LEVELS, reason="the C++ kernels are not built")


class AtLevel:
    """The kernels of one level, in the place of the module."""

    def __init__(self, level: str) -> None:
        self.level = level

    def __getattr__(self, name: str):
        assert kernels.use(self.level) == self.level
        return getattr(native, name)


@pytest.fixture(autouse=True)
def level_as_before():
    before = kernels.in_use()
    yield
    kernels.use(before)


NATIVES = [AtLevel(level) for level in LEVELS]
IMPLEMENTATIONS = (reference, *NATIVES)
each_level = pytest.mark.parametrize("native", NATIVES, ids=LEVELS)


def tensors(numel: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of every kind that has its own path; at the last, memory that is aligned to the element alone."""
    heavy = random(numel, seed=numel)
    every = {
        "heavy tails": heavy,
        "zeros": torch.zeros(numel),
        "negative zeros": torch.full((numel,), -0.0),
        "constant": torch.full((numel,), -0.3),
        "denormal": heavy * 1e-41,
        "tiny": heavy * 1e-30,
        "huge": heavy.sign() * 3e38,
        "spike": torch.zeros(numel).index_fill_(0, torch.tensor([numel - 1] if numel else [], dtype=torch.long), 5.0),
        "far from zero": heavy * 1e-3 + 7,
        "unaligned": random(numel + 1, seed=1)[1:],
    }
    return {name: values.to(dtype) if dtype != torch.float32 else values for name, values in every.items()}


def payload(length: int) -> torch.Tensor:
    """Where a payload goes, behind 3 bytes and before 8 that nobody may touch."""
    return torch.full((3 + length + 8,), CANARY, dtype=torch.uint8)


def written(encode, length: int, *arguments) -> tuple[int, bytes]:
    buffer = payload(length)
    result = encode(*arguments, buffer[3 : 3 + length])
    assert bits(buffer[:3]) == bytes([CANARY] * 3)
    assert bits(buffer[3 + length :]) == bytes([CANARY] * 8)
    return result, bits(buffer[3 : 3 + length].clone()) if result >= 0 else b""


def all_write(name: str, length: int, *arguments) -> bytes:
    """What all implementations write, which must be the same."""
    theirs, *others = [written(getattr(module, name), length, *arguments) for module in IMPLEMENTATIONS]
    assert all(other == theirs for other in others)
    return theirs[1]


def summed(name: str, payloads: list[bytes], numel: int, divisor: float, *options) -> None:
    parts = [torch.zeros(len(part), dtype=torch.uint8) for part in payloads]
    for part, values in zip(parts, payloads):
        part.numpy()[:] = np.frombuffer(values, np.uint8)
    outs = []
    for module in IMPLEMENTATIONS:
        buffer = torch.full((numel + 9,), 77.0)
        bound = getattr(module, name)(parts, *options, divisor, buffer[1 : 1 + numel])
        assert buffer[0] == 77
        assert bool((buffer[1 + numel :] == 77).all())
        outs.append((bits(buffer[1 : 1 + numel]), bound < float("inf")))
        assert bound >= reference.largest(buffer[1 : 1 + numel])
    assert all(other == outs[0] for other in outs)


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_moments(native, numel, dtype):
    for name, values in tensors(numel, dtype).items():
        assert native.largest(values) == reference.largest(values), name
        assert native.moments(values) == reference.moments(values), name
        assert native.magnitudes(values) == reference.magnitudes(values), name


@each_level
def test_the_mean_magnitude(native):
    values = random(10_000)
    assert native.magnitudes(values)[1] == pytest.approx(float(values.double().abs().mean()), rel=1e-12)


@each_level
@pytest.mark.parametrize("k", [0, 1, 10, 999, 1000])
def test_the_places_of_the_largest_are_those_of_the_torch_operations(native, k):
    assert kernels.use(native.level) == native.level
    for values in (random(1000), torch.zeros(1000), (torch.arange(1000) % 7).float()):
        assert torch.equal(kernels.largest_positions(values, k), topk_indices(values, k))


@each_level
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 5, 500, 998, 999])
def test_what_is_not_finite_is_seen(native, bad, place):
    values = random(1000)
    values[place] = bad
    assert native.largest(values) == float("inf")
    assert native.moments(values)[0] == float("inf")
    for dtype in DTYPES:
        spoilt = values.to(dtype)
        assert native.bfloat_encode(spoilt, payload(2000)) == kernels.NOT_FINITE
        assert native.quantise_encode(spoilt, 4, 64, False, KEY, False, payload(2000)) == kernels.NOT_FINITE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_ternary(numel, dtype):
    length = 4 + kernels.ternary_bytes(numel)
    payloads = []
    for values in tensors(numel, dtype).values():
        top, sigma = reference.moments(values)
        if top < float("inf"):
            bound = min(top, float(torch.tensor(2.5 * sigma)) or top)
            payloads.append(all_write("ternary_encode", length, values, bound, bound, KEY, False))
            all_write("ternary_encode", length, values, bound / 3, top, KEY, True)
    for ranks in (1, 2, 3, 4, 5, len(payloads)):
        for divisor in (1.0, 3.0, 4.0):
            summed("ternary_sum", payloads[:ranks], numel, divisor)


@pytest.mark.parametrize("code_bits", range(1, 9))
@pytest.mark.parametrize("numel", [0, 1, 9, 255, 256, 257, 513, 4099])
def test_quantised(numel, code_bits):
    for bucket, l2, dtype in ((512, False, torch.float32), (64, True, torch.float16), (8, True, torch.float32)):
        length = kernels.quantised_bytes(numel, code_bits, bucket)
        payloads = [
            written_
            for values in tensors(numel, dtype).values()
            if (written_ := all_write("quantise_encode", length, values, code_bits, bucket, l2, KEY, l2)) or not numel
        ]
        for divisor in (1.0, 3.0):
            summed("quantise_sum", payloads[:4], numel, divisor, code_bits, bucket)


@pytest.mark.parametrize("code_bits", range(1, 9))
@pytest.mark.parametrize("numel", [0, 1, 9, 255, 256, 257, 513, 4099])
def test_affine(numel, code_bits):
    length = kernels.affine_bytes(numel, code_bits)
    for dtype in DTYPES:
        for values in tensors(numel, dtype).values():
            sent = all_write("affine_encode", length, values, code_bits, KEY)
            if len(sent) == length:
                part = torch.frombuffer(bytearray(sent) or bytearray(1), dtype=torch.uint8)[:length]
                outs = [torch.full((numel + 9,), 77.0) for _ in IMPLEMENTATIONS]
                for module, out in zip(IMPLEMENTATIONS, outs):
                    module.affine_decode(part, code_bits, out[1 : 1 + numel])
                assert all(torch.equal(out, outs[0]) for out in outs)
                assert outs[0][0] == 77
                assert bool((outs[0][1 + numel :] == 77).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_bfloat(numel, dtype):
    payloads = [all_write("bfloat_encode", 2 * numel, values) for values in tensors(numel, dtype).values()]
    for divisor in (1.0, 3.0):
        summed("bfloat_sum", [part for part in payloads if part or not numel][:3], numel, divisor)


@each_level
@pytest.mark.parametrize("numel", NUMELS[1:])
@pytest.mark.parametrize("threshold", [1e-42, 1e-30, 0.5, 3.0])
def test_pruned(native, numel, threshold):
    for name, values in tensors(numel).items():
        mine, total, below = native.prune_dense(values, threshold, KEY)
        theirs, their_total, their_below = prune.prune_dense(values, threshold, KEY)
        assert (bits(mine), below) == (bits(theirs), their_below), name
        assert total == pytest.approx(their_total, rel=1e-12)


def residuals(numel: int):
    """None, and one that makes sums tie, cancel and vanish."""
    return None, torch.where(torch.arange(numel) % 3 == 0, -random(numel, seed=numel), random(numel, seed=7))


def fed_back(name: str, room: int, values, residual, *options) -> tuple[bytes, int]:
    """As `all_write`, of kernels with error feedback, which must leave the same behind; and their result."""
    outcomes = []
    for module in IMPLEMENTATIONS:
        buffer, kept = payload(room), torch.full((values.numel() + 9,), 77.0)
        arguments = (values, residual, kept[1 : 1 + values.numel()], *options, buffer[3 : 3 + room])
        length = getattr(module, name)(*arguments)
        assert bits(buffer[:3]) == bytes([CANARY] * 3)
        assert bits(buffer[3 + room :]) == bytes([CANARY] * 8)
        assert kept[0] == 77
        assert bool((kept[1 + values.numel() :] == 77).all())
        sent = bits(buffer[3 : 3 + length].clone()) if length >= 0 else b""
        outcomes.append((length, sent, bits(kept) if length != kernels.NOT_FINITE else b""))
    assert all(other == outcomes[0] for other in outcomes), name
    return outcomes[0][1], outcomes[0][0]


def each_sum(numel: int, dtype: torch.dtype = torch.float32):
    """Gradients and residuals whose sums are finite."""
    for name, values in tensors(numel, dtype).items():
        for residual in residuals(numel):
            if name != "huge" or residual is None:
                yield values, residual


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_accumulated(native, numel, dtype):
    for values, residual in each_sum(numel, dtype):
        mine, theirs = torch.empty(numel), torch.empty(numel)
        assert native.accumulate(values, residual, mine) == reference.accumulate(values, residual, theirs)
        assert bits(mine) == bits(theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("bucket", [256, 512, 1024])
def test_signs(numel, dtype, bucket):
    length = kernels.quantised_bytes(numel, 1, bucket)
    payloads = [fed_back("sign_encode", length, *each, bucket)[0] for each in each_sum(numel, dtype)]
    summed("quantise_sum", payloads[:4], numel, 3.0, 1, bucket)


@pytest.mark.parametrize("bucket", [256, 2048])
def test_signs_of_a_large_tensor_go_around_the_caches(bucket):
    """Where memory is aligned, and past a megabyte."""
    values, residual = random(300_001), random(300_001, seed=1)
    found = []
    for module in IMPLEMENTATIONS:
        kept, room = torch.empty(300_001), torch.empty(kernels.quantised_bytes(300_001, 1, bucket), dtype=torch.uint8)
        assert module.sign_encode(values, residual, kept, bucket, room) == room.numel()
        found.append((bits(kept), bits(room)))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("place", [0, 3, 300, 999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_signs_of_what_is_not_finite(place, value):
    values = random(1000)
    values[place] = value
    length = kernels.quantised_bytes(1000, 1, 512)
    assert fed_back("sign_encode", length, values, None, 512)[1] == kernels.NOT_FINITE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [*NUMELS, 140_000])
def test_largest(numel, dtype):
    payloads = []
    for values, residual in each_sum(numel, dtype):
        for k in sorted({min(max(part, 1), numel) for part in (1, numel // 100, numel // 3, numel)}):
            room = kernels.sparse_bytes(numel, k)
            payloads.append(fed_back("topk_encode", room, values, residual, k)[0])
    payloads = [part for part in payloads if part or not numel]
    for ranks in (1, 2, 5, len(payloads)):
        summed("sparse_sum", payloads[:ranks], numel, float(ranks))
    for payload in map(damaged, filter(None, payloads)):
        expected, *found = [module.sparse_positions(payload, numel) for module in IMPLEMENTATIONS]
        assert all(positions.equal(expected) for positions in found)


@pytest.mark.parametrize("numel", [1000, 70_001])
def test_largest_of_elements_that_come_in_an_unlikely_order(numel):
    """What a sample makes of them is far off: the largest are where it does not look, or everywhere it does."""
    ascending = torch.arange(numel, dtype=torch.float32)
    sampled = torch.zeros(numel)
    for start in range(0, numel, max(numel // (numel // 128), 1)):
        sampled[start : start + 8] = 9.0
    for values in (ascending, -ascending.flip(0), sampled, 9 - sampled, (ascending % 7 == 3).float()):
        for k in (1, 10, numel // 5):
            fed_back("topk_encode", kernels.sparse_bytes(numel, k), values, None, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [*NUMELS, 140_000])
def test_what_reaches_a_threshold(numel, dtype):
    payloads = []
    for values, residual in each_sum(numel, dtype):
        for threshold in (1e-42, 0.3, 1.0, 5.0):
            for entries in (numel, numel // 3, 3):
                room = kernels.sparse_bytes(numel, entries)
                sent, length = fed_back("threshold_encode", room, values, residual, threshold)
                payloads += [sent] * (length >= 0)
            fed_back("threshold_encode", 2, values, residual, threshold)
    summed("sparse_sum", payloads[:9], numel, 3.0)


@pytest.mark.parametrize("bin_size", [1, 5, 8, 50, 64, 65, 500, 16_384])
@pytest.mark.parametrize("numel", [0, 1, 9, 255, 513, 4099, 70_001])
def test_adacomp(numel, bin_size):
    payloads = []
    for dtype in DTYPES:
        for values, residual in each_sum(numel, dtype):
            sent, length = fed_back("adacomp_encode", 4 + 2 * numel + 200, values, residual, bin_size)
            payloads.append(sent)
            for room in (3, 4, max(length - 1, 0), max(length, 4)):
                fed_back("adacomp_encode", room, values, residual, bin_size)
    width = kernels.token_width(bin_size)
    for ranks in (1, 2, 7):
        summed("gaps_sum", [part for part in payloads if part][:ranks], numel, float(ranks), width)


@pytest.mark.parametrize("place", [0, 5, 500, 998, 999])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_accumulates_to_no_finite_value_is_seen(bad, place):
    spoilt = random(1000)
    spoilt[place] = bad
    for values, residual in ((spoilt, None), (random(1000), spoilt)):
        for name, option in (("topk_encode", 10), ("threshold_encode", 1.0), ("adacomp_encode", 50)):
            assert fed_back(name, 5000, values, residual, option)[1] == kernels.NOT_FINITE
            if name != "topk_encode":
                assert fed_back(name, 5, values, residual, option)[1] == kernels.NOT_FINITE


def damaged(of: bytes, *changes: tuple[int, int]) -> torch.Tensor:
    spoilt = bytearray(of)
    for place, value in changes:
        spoilt[place] = value
    return torch.frombuffer(spoilt, dtype=torch.uint8)


def test_damaged_sparse_payloads_are_refused():
    numel = 70_000
    values = random(numel)
    sent, _ = fed_back("topk_encode", kernels.sparse_bytes(numel, 100), values, None, 100)
    whole = damaged(sent)
    places = 8 + 4 * 100
    for spoilt in (
        whole[:7].clone(),
        whole[:-2].clone(),
        damaged(sent, (0, sent[0] + 1)),
        damaged(sent, (3, 1)),
        damaged(sent, (places, 255), (places + 1, 255)),
        damaged(sent, (len(sent) - 2, 255), (len(sent) - 1, 255)),
    ):
        for module in IMPLEMENTATIONS:
            with pytest.raises(kernels.PayloadError) as raised:
                module.sparse_sum([whole, spoilt, whole], 1.0, torch.empty(numel))
            assert raised.value.rank == 1
            with pytest.raises(ValueError, match="positions|bytes"):
                module.sparse_positions(spoilt, numel)


def test_damaged_gap_codes_are_refused():
    sent, _ = fed_back("adacomp_encode", 5000, random(1000), None, 500)
    whole = damaged(sent)
    for spoilt in (whole[:3].clone(), whole[:-1].clone(), damaged(sent, (len(sent) - 1, 127))):
        for module in IMPLEMENTATIONS:
            with pytest.raises(kernels.PayloadError) as raised:
                module.gaps_sum([whole, spoilt], 16, 1.0, torch.empty(1000))
            assert raised.value.rank == 1


def test_sums_that_overflow_are_seen_by_all():
    huge = [torch.full((100,), 3e38), torch.full((100,), 3e38)]
    for same in (True, False):
        payloads = []
        for number, values in enumerate(huge):
            values = values * (torch.arange(100) % 2 == (0 if same else number))
            payloads.append(fed_back("topk_encode", kernels.sparse_bytes(100, 50), values, None, 50)[0])
        parts = [damaged(part) for part in payloads]
        for module in IMPLEMENTATIONS:
            assert (module.sparse_sum(parts, 1.0, torch.empty(100)) == float("inf")) is same


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_pruned_and_packed(numel, dtype):
    room, start = 4 + kernels.ternary_bytes(numel) + 4 * numel, 4 + kernels.ternary_bytes(numel)
    payloads = []
    for values in tensors(numel, dtype).values():
        for threshold in (0.0, 1e-42, 1e-30, 0.5, 3.0):
            limit = float(torch.tensor(threshold))
            length, sent = written(reference.prune_encode, room, values, limit, KEY)
            for other in NATIVES:
                assert written(other.prune_encode, room, values, limit, KEY)[0] == length
            if length >= 0:
                assert all_write("prune_encode", length, values, limit, KEY) == sent[:length]
                payloads.append(sent[:length])
            for less in (start - 1, start, length - 4):
                if less >= 0:
                    outcome = written(reference.prune_encode, less, values, limit, KEY)[0]
                    for other in NATIVES:
                        assert written(other.prune_encode, less, values, limit, KEY)[0] == outcome
    for ranks in (1, 2, 5, len(payloads)):
        summed("prune_sum", payloads[:ranks], numel, float(ranks))


def test_damaged_pruned_payloads_are_refused():
    length, sent = written(reference.prune_encode, 8000, random(1000), 0.5, KEY)
    whole = damaged(sent[:length])
    more = next(place for place in range(4, 200) if sent[place] & 3 == 0)
    for spoilt in (
        whole[:100].clone(),
        whole[:-4].clone(),
        damaged(sent[: length + 4]),
        damaged(sent[:length], (3, 191)),
        damaged(sent[:length], (3, 127), (2, 128)),
        damaged(sent[:length], (more, sent[more] | 3)),
    ):
        for module in IMPLEMENTATIONS:
            with pytest.raises(kernels.PayloadError) as raised:
                module.prune_sum([whole, spoilt, whole], 1.0, torch.empty(1000))
            assert raised.value.rank == 1


def test_payloads_of_the_wrong_length_are_refused():
    for module in IMPLEMENTATIONS:
        for name, options in (("ternary_sum", ()), ("quantise_sum", (4, 512)), ("bfloat_sum", ())):
            with pytest.raises(kernels.PayloadError, match="3 bytes instead of"):
                getattr(module, name)([torch.zeros(3, dtype=torch.uint8)], *options, 1.0, torch.zeros(100))


@each_level
@pytest.mark.parametrize("length", [0, 1, 15, 16, 63, 64, 65, 79, 80, 127, 128, 1000, 4096, 65_537])
def test_checksums_are_those_of_zlib(native, length):
    data = random(length, seed=length).view(torch.uint8)[:length]
    assert native.crc32(b"header", data) == zlib.crc32(b"header" + bits(data))


@pytest.mark.parametrize(
    ("value", "shown"), [("torch", "torch"), ("plain", "plain"), ("fast", "must be torch, plain or avx2")]
)
def test_the_environment_chooses(value, shown):
    program = "import torch; from hvd_compress import kernels; print(kernels.in_use())"
    environment = os.environ | {native.VARIABLE: value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert shown in done.stdout + done.stderr
