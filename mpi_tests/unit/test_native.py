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

from .drive import bits, random

LEVELS = [level for level in native.LEVELS if native.select(level) == level]
NUMELS = (0, 1, 7, 8, 9, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 513, 1000, 4099, 70_001)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEY = kernels.stream_key(3, 1, 4, 1)
CANARY = 0xA5

pytestmark = pytest.mark.skipif(not LEVELS, reason="the C++ kernels are not built")


@pytest.fixture(params=LEVELS or ["none"], autouse=True)
def level(request):
    before = kernels.in_use()
    assert kernels.use(request.param) == request.param
    yield request.param
    kernels.use(before)


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


def both(name: str, length: int, *arguments) -> bytes:
    """What both implementations write, which must be the same."""
    theirs = written(getattr(reference, name), length, *arguments)
    assert written(getattr(native, name), length, *arguments) == theirs
    return theirs[1]


def summed(name: str, payloads: list[bytes], numel: int, divisor: float, *options) -> None:
    parts = [torch.zeros(len(part), dtype=torch.uint8) for part in payloads]
    for part, values in zip(parts, payloads):
        part.numpy()[:] = np.frombuffer(values, np.uint8)
    outs = []
    for module in (reference, native):
        buffer = torch.full((numel + 9,), 77.0)
        bound = getattr(module, name)(parts, *options, divisor, buffer[1 : 1 + numel])
        assert buffer[0] == 77
        assert bool((buffer[1 + numel :] == 77).all())
        outs.append((bits(buffer[1 : 1 + numel]), repr(bound)))
    assert outs[0] == outs[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_moments(numel, dtype):
    for name, values in tensors(numel, dtype).items():
        assert native.largest(values) == reference.largest(values), name
        assert native.moments(values) == reference.moments(values), name


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 5, 500, 998, 999])
def test_what_is_not_finite_is_seen(bad, place):
    values = random(1000)
    values[place] = bad
    assert native.largest(values) == float("inf")
    assert native.moments(values)[0] == float("inf")
    for dtype in DTYPES:
        spoilt = values.to(dtype)
        assert native.bfloat_encode(spoilt, payload(2000)) == kernels.NOT_FINITE
        assert native.quantise_encode(spoilt, 4, 64, False, KEY, payload(2000)) == kernels.NOT_FINITE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_ternary(numel, dtype):
    length = 4 + kernels.ternary_bytes(numel)
    payloads = []
    for values in tensors(numel, dtype).values():
        top, sigma = reference.moments(values)
        if top < float("inf"):
            bound = min(top, float(torch.tensor(2.5 * sigma)) or top)
            payloads.append(both("ternary_encode", length, values, bound, bound, KEY))
            both("ternary_encode", length, values, bound / 3, top, KEY)
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
            if (written_ := both("quantise_encode", length, values, code_bits, bucket, l2, KEY)) or not numel
        ]
        for divisor in (1.0, 3.0):
            summed("quantise_sum", payloads[:4], numel, divisor, code_bits, bucket)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_bfloat(numel, dtype):
    payloads = [both("bfloat_encode", 2 * numel, values) for values in tensors(numel, dtype).values()]
    for divisor in (1.0, 3.0):
        summed("bfloat_sum", [part for part in payloads if part or not numel][:3], numel, divisor)


@pytest.mark.parametrize("numel", NUMELS[1:])
@pytest.mark.parametrize("threshold", [1e-42, 1e-30, 0.5, 3.0])
def test_pruned(numel, threshold):
    for name, values in tensors(numel).items():
        mine, total, below = native.prune_dense(values, threshold, KEY)
        theirs, their_total, their_below = prune.prune_dense(values, threshold, KEY)
        assert (bits(mine), below) == (bits(theirs), their_below), name
        assert total == pytest.approx(their_total, rel=1e-12)


def test_payloads_of_the_wrong_length_are_refused():
    for module in (native, reference):
        for name, options in (("ternary_sum", ()), ("quantise_sum", (4, 512)), ("bfloat_sum", ())):
            with pytest.raises(kernels.PayloadError, match="3 bytes instead of"):
                getattr(module, name)([torch.zeros(3, dtype=torch.uint8)], *options, 1.0, torch.zeros(100))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 63, 64, 65, 79, 80, 127, 128, 1000, 4096, 65_537])
def test_checksums_are_those_of_zlib(length):
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
