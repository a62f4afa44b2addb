"""Frames as version 1 wrote them: they must decode for ever, and nobody may write others unnoticed.

If a test of reading fails, old and new versions can no longer work together; one of writing fails as well where random
numbers change, which each rank draws for itself.
"""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress import wire

from .drive import FRAMED, bits, run

RANK, INDEX, STEP, SEED, NUMEL = 1, 3, 2, 7, 150


def gradient(rank: int) -> torch.Tensor:
    """Multiples of 1/64 between -50/64 and 50/64: exact in every type but float16 of the sum."""
    return ((torch.arange(NUMEL) * 37 + rank * 11) % 101 - 50) / 64


FRAMES = {
    "bf16": (
        "6843010201000100030000000000804196000000000000002c0100000000000054fd49201cbf00bd0c3fe8be003e343f98be"
        "903e38bf10bee03e10bf803c183fd0be303e403f80bea83e2cbfc0bdf83e04bf803d243fb8be603e48bf50bec03e20bf40bd"
        "083ff0bee03d303fa0be883e3cbf20bed83e14bf0000143fd8be203e3c3f88bea03e30bfe0bdf03e08bf403d203fc0be503e"
        "483f60beb83e24bf80bd043ff8bec03d2c3fa8be803e40bf30bed03e18bf80bc103fe0be103e383f90be983e34bf00bee83e"
        "0cbf003d1c3fc8be403e443f70beb03e28bfa0bd003f00bfa03d283fb0be703e44bf40bec83e1cbf00bd0c3fe8be003e343f"
        "98be903e38bf10bee03e10bf803c183fd0be303e403f80bea83e2cbfc0bdf83e04bf803d243fb8be603e48bf50bec03e20bf"
        "40bd083ff0bee03d303fa0be883e3cbf20bed83e14bf0000143fd8be203e3c3f88bea03e"
    ),
    "terngrad": (
        "684301030100010003000000000000409600000000000000440000000000000047b267e80000483f5a1500aa006a55010100"
        "a0428851810800a246005401005aa016018000881a151600000028000000000000001a000000000000000400000000000000"
        "00000000"
    ),
    "terngrad_local_unclipped": (
        "684301030100010003000000000000409600000000000000440000000000000047b267e80000483f5a1500aa006a55010100"
        "a0428851810800a246005401005aa016018000881a151600000028000000000000001a000000000000000400000000000000"
        "00000000"
    ),
    "adacomp_5": (
        "6843010401000100030000000000a04096000000000000005200000000000000111277d3abaa2e3f80018001820180018001"
        "8201800182820180018201800180018201800102820180018201800180018201800180018201800182018001800182018001"
        "8001820180018201800180018201800180010000"
    ),
    "adacomp": (
        "6843010401000100030000000000fa4396000000000000009e000000000000001da5a0c50000483f00800100008001000280"
        "0100008001000080010002800100008001000280028001000080010002800100008001000080010002800100008001000200"
        "0280010000800100028001000080010000800100028001000080010000800100028001000080010002800100008001000080"
        "01000280010000800100008001000280010000800100028002800100008001000280010000800100008001000000"
    ),
    "topk_0.3": (
        "6843010501000100030000009a99993e96000000000000001201000000000000563b5c052d00000000001cbf0000343f0000"
        "38bf000010bf0000183f0000403f00002cbf0000243f000048bf000020bf0000303f00003cbf000014bf0000143f00003c3f"
        "000030bf0000203f0000483f000024bf00002c3f000040bf000018bf0000103f0000383f000034bf00001c3f0000443f0000"
        "28bf0000283f000044bf00001cbf0000343f000038bf000010bf0000183f0000403f00002cbf0000243f000048bf000020bf"
        "0000303f00003cbf000014bf0000143f00003c3f0000050008000b000d001000130018001b001e002300260029002b002e00"
        "3100360039003c0041004400470049004c004f00540057005a005f00620065006a006d0070007200750078007d0080008300"
        "88008b008e00900093000000"
    ),
    "dense": "6843010501010100030000000000803f03000000000000000c00000000000000d874232900001cbf000000bd00000c3f",
    "not finite": "6843010501020100030000009a99993e96000000000000000000000000000000b8e43aa0",
}

# Of TernGrad, since ranks draw in pairs.
PAIRED = (
    "68430103010001000300000000000040960000000000000044000000000000005a2c25870000483f5a0400a8886801000580"
    "8816aa4500a0008816115501a258a056012000205a1506000000280000000400000018000000200000001500000002000000"
    "00000000"
)
WRITTEN = FRAMES | {"terngrad": PAIRED, "terngrad_local_unclipped": PAIRED}

# Of TernGrad, whose random numbers decide what is sent.
CODES = (
    "-0+00000-00-0+00+0000+-0+00-0+-0+-0+-+-0+-0000+-+-0+-0+00+0+-00-0+0+-0+-0+0"
    "0+00-0+-0000+0+--+000-+-00-0+-00-0-0+-0000+0+-0+00+-0-00-0000+-0-0+00+-0+00"
)

COMPRESSORS = FRAMED | {"dense": FRAMED["topk_1.0"], "not finite": FRAMED["topk_0.3"]}


def gradients(name: str) -> list[torch.Tensor]:
    both = [gradient(0), gradient(1)]
    if name == "dense":
        both = [whole[:3] for whole in both]
    if name == "not finite":
        both[1][5] = math.nan
    return both


def saved(name: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(FRAMES[name]), dtype=torch.uint8)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_bytes_on_the_wire_never_change(name):
    outcome = run(COMPRESSORS[name], gradients(name), index=INDEX, step=STEP, seed=SEED)
    assert bits(outcome.frames[RANK]).hex() == WRITTEN[name]


@pytest.mark.parametrize("name", FRAMES)
def test_the_headers_of_saved_frames_are_read(name):
    frame = wire.unpack(saved(name), RANK)
    assert (frame.sender, frame.parameter, frame.dtype) == (RANK, INDEX, torch.float32)
    assert frame.numel == gradients(name)[1].numel()
    assert frame.algorithm == COMPRESSORS[name].algorithm
    assert (frame.dense, frame.finite) == (name == "dense", name != "not finite")


def decoded(name: str) -> torch.Tensor | None:
    """What the saved frame of rank 1 says; rank 0 has nothing."""
    both = gradients(name)
    both[0].zero_()

    def tamper(frames: list[torch.Tensor]) -> list[torch.Tensor]:
        return [frames[0], saved(name)]

    return run(COMPRESSORS[name], both, index=INDEX, step=STEP, seed=SEED, tamper=tamper).totals[0]


def test_saved_bfloat16_frames_decode():
    assert torch.equal(decoded("bf16"), gradient(1).to(torch.bfloat16).float())


def test_saved_dense_frames_decode():
    assert torch.equal(decoded("dense"), gradient(1)[:3])


def test_saved_non_finite_frames_decode():
    assert decoded("not finite") is None


def test_saved_topk_frames_decode():
    order = sorted(range(NUMEL), key=lambda i: (-abs(float(gradient(1)[i])), i))[: math.ceil(0.3 * NUMEL)]
    expected = torch.zeros(NUMEL)
    expected[order] = gradient(1)[order]
    assert torch.equal(decoded("topk_0.3"), expected)


@pytest.mark.parametrize(("name", "bin_size"), [("adacomp_5", 5), ("adacomp", 500)])
def test_saved_adacomp_frames_decode(name, bin_size):
    """Without a residual every element of at least half its bin's largest is sent."""
    bins = [gradient(1)[start : start + bin_size] for start in range(0, NUMEL, bin_size)]
    scale = sum(float(inside.abs().max()) for inside in bins) / len(bins)
    expected = torch.cat([torch.where(2 * b.abs() >= b.abs().max(), b.sign() * scale, 0.0) for b in bins])
    assert torch.allclose(decoded(name), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["terngrad", "terngrad_local_unclipped"])
def test_saved_ternary_frames_decode(name):
    values = decoded(name)
    scaler = 50 / 64
    assert set(values.tolist()) == {-scaler, 0.0, scaler}
    assert bool((values * gradient(1) >= 0).all())
    assert "".join("-0+"[int(sign) + 1] for sign in values.sign().tolist()) == CODES
