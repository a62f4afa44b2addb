"""What a controller asks of compressors: rates to choose from, what each sends and loses; and rates by schedule."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from hvd_compress import wire
from hvd_compress.compressors import AdaCompCompressor, QSGDCompressor, TopKCompressor
from hvd_compress.local import LocalRanks
from hvd_compress.schedules import ExponentialWarmup, Steps

from .drive import bits, bound, random, run
from .test_contract import ranks_of

SHAPES = [(30, 40), (64, 3, 7, 7), (70_001,), (300, 400), (5, 5), (2, 2), (3,), (1,), (0, 4)]
BY_RATE = {
    "qsgd": lambda rate: QSGDCompressor(bits=rate),
    "qsgd_l2": lambda rate: QSGDCompressor(bits=rate, bucket_size=64, norm="l2"),
    "topk": lambda rate: TopKCompressor(density=rate),
    "adacomp": lambda rate: AdaCompCompressor(bin_size=rate),
}
EXACT = {"qsgd": (1, 2, 3, 4, 5, 8), "qsgd_l2": (1, 4, 7), "topk": (1e-6, 0.001, 0.01, 0.3, 0.65, 0.67, 1.0)}

families = pytest.mark.parametrize("family", BY_RATE)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def sent_at(compressor, shape, rate):
    """Bytes that a rank sends where a controller has set `rate`."""
    (compression,) = (ranks := LocalRanks([bound(compressor, {"w": shape, "m": (1, 1)})])).compressions
    (slot, _) = compression.slots
    slot.rate, slot.parameter = rate, dataclasses.replace(slot.parameter, compressed=True)
    ranks.exchange([{"w": random(*shape)}])
    return compression.telemetry.total.sent_bytes


@shapes
@pytest.mark.parametrize(("family", "rate"), [(family, rate) for family, rates in EXACT.items() for rate in rates])
def test_payload_bytes_are_those_that_are_sent(family, rate, shape):
    make = BY_RATE[family]
    expected = make(rate).payload_bytes(torch.Size(shape), rate)
    outcome = run(make(rate), ranks_of(random(*shape), 2))
    assert outcome.sent_bytes == [expected] * 2 == [frame.numel() for frame in outcome.frames]
    assert sent_at(make(EXACT[family][1]), shape, float(rate)) == expected


@shapes
@families
def test_candidates_ascend_and_all_of_them_save(family, shape):
    compressor, size = BY_RATE[family](1), torch.Size(shape)
    candidates = compressor.candidates(size)
    assert list(candidates) == sorted(set(candidates))
    assert all(compressor.payload_bytes(size, rate) <= 4 * size.numel() for rate in candidates)
    assert bool(candidates) == (size.numel() > 20)
    payloads = [compressor.payload_bytes(size, rate) for rate in candidates]
    if family != "adacomp":
        assert payloads == sorted(payloads)


def test_adacomp_payloads_are_estimates_of_the_right_size():
    """Of gradients that agree in part from step to step, once residuals have settled."""
    for bin_size in (50, 500):
        compressor = AdaCompCompressor(bin_size=bin_size)
        (compression,) = (ranks := LocalRanks([bound(compressor, {"w": (300, 200)})])).compressions
        for step in range(60):
            if step == 30:
                compression.telemetry.reset()
            ranks.exchange([{"w": random(300, 200, seed=step) + 0.3 * random(300, 200, seed=1000)}])
        sent = compression.telemetry.total.sent_bytes / 30
        assert 1 / 4 < compressor.payload_bytes(torch.Size([300, 200]), bin_size) / sent < 4
    assert AdaCompCompressor().payload_bytes(torch.Size([3]), 500) <= wire.frame_bytes(12)


# Errors


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("tensor", [random(300, 400), torch.randn(200_000, generator=torch.Generator().manual_seed(0))])
def test_errors_of_top_k_are_those_of_what_is_left_out(tensor, scale):
    compressor = TopKCompressor()
    rates = (*compressor.candidates(tensor.shape), 1.0)
    ascending = tensor.view(-1).abs().double().sort().values
    for rate, error in zip(rates, compressor.errors(tensor * scale, rates)):
        k = math.ceil(rate * tensor.numel() - 1e-9)
        left = scale * float(ascending[: tensor.numel() - k].norm())
        assert error == pytest.approx(left, rel=0.01) if rate < 1 else error == 0


@pytest.mark.parametrize("values", [[0.0] * 3000 + [2.0] * 1000, [1.0] * 4000, [0.0] * 3999 + [5.0]])
def test_errors_of_top_k_where_many_entries_are_equal(values):
    tensor = torch.tensor(values)
    for density in (0.001, 0.1, 0.25, 0.5):
        left = tensor.sort().values[: 4000 - math.ceil(density * 4000)]
        (error,) = TopKCompressor().errors(tensor, (density,))
        assert error == pytest.approx(float(left.norm()), rel=1e-6)


@pytest.mark.parametrize("rate", [1, 2, 4, 8])
@pytest.mark.parametrize("family", ["qsgd", "qsgd_l2"])
@pytest.mark.parametrize("numel", [40_000, 40_100])
def test_errors_of_qsgd_are_those_of_its_rounding_on_average(family, rate, numel):
    compressor, tensor = BY_RATE[family](rate), random(numel, seed=3)
    squares = [float((run(compressor, [tensor], seed=s).totals[0] - tensor).double().square().sum()) for s in range(20)]
    (error,) = compressor.errors(tensor, (float(rate),))
    mean = sum(squares) / len(squares)
    deviation = math.sqrt(sum((square - mean) ** 2 for square in squares) / (len(squares) - 1) / len(squares))
    assert abs(error**2 - mean) <= 4 * deviation  # 1 in 10,000 by chance, if it is right


@pytest.mark.parametrize("rate", [5, 50, 64, 100, 500])
def test_errors_of_adacomp_are_its_first_residual(rate):
    tensor = random(300, 40)
    outcome = run(AdaCompCompressor(bin_size=rate), [tensor])
    outcome.memories[0].commit()
    (error,) = AdaCompCompressor().errors(tensor, (rate,))
    assert error == pytest.approx(float(outcome.memories[0].residuals["weight"].norm()), rel=1e-6)


@families
def test_errors_need_no_special_case(family):
    compressor, rates = BY_RATE[family](1), (1.0, 1.0)
    assert compressor.errors(torch.zeros(30, 40), rates) == [0.0, 0.0]
    assert compressor.errors(torch.zeros(0), rates) == [0.0, 0.0]
    for value in (math.nan, math.inf, -math.inf):
        assert compressor.errors(torch.full((30, 40), value), rates) == [math.inf] * 2
    assert all(map(math.isfinite, compressor.errors(random(30, 40) * 1e-42, rates)))
    strided = random(40, 30).t()
    before = bits(strided)
    assert compressor.errors(strided, rates) == compressor.errors(strided.contiguous(), rates)
    assert bits(strided) == before


# Rates that change


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: QSGDCompressor(bits=Steps.evenly((3, 4, 6, 8), 8)), [3, 3, 4, 4, 6, 6, 8, 8]),
        (lambda: TopKCompressor(density=ExponentialWarmup(interval=1)), [0.25, 0.0625, 0.015625, 0.00390625, 0.001]),
        (lambda: AdaCompCompressor(bin_size=lambda step: 10 * (step + 1)), [10, 20, 30]),
    ],
    ids=["progressive bits", "warm-up", "bins"],
)
def test_rates_follow_their_schedule_and_stand_in_the_frames(make, expected):
    for step, rate in enumerate(expected):
        outcome = run(make(), ranks_of(random(40, 50), 3), step=step)
        assert [frame.rate for frame in outcome.parsed()] == [wire.rounded(rate)] * 3
    ranks = LocalRanks([bound(make(), {"w": (40, 50)}) for _ in range(2)])
    compressor = ranks.compressions[0].compressor
    sent = []
    for step, _ in enumerate(expected):
        ranks.exchange([{"w": gradient} for gradient in ranks_of(random(40, 50, seed=step), 2)])
        sent.append(ranks.compressions[0].telemetry.total.sent_bytes - sum(sent))
    if not isinstance(compressor, AdaCompCompressor):
        assert sent == [compressor.payload_bytes(torch.Size([40, 50]), rate) for rate in expected]


@pytest.mark.parametrize(("family", "mine", "theirs"), [("qsgd", 4, 5), ("topk", 0.1, 0.2), ("adacomp", 50, 60)])
def test_ranks_at_different_rates_notice(family, mine, theirs):
    ranks = LocalRanks([bound(BY_RATE[family](mine), {"w": (40, 50)}) for _ in range(2)])
    ranks.compressions[1].slots[0].rate = theirs
    with pytest.raises(wire.WireError, match="rate"):
        ranks.exchange([{"w": random(40, 50)}] * 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda step: QSGDCompressor(bits=lambda at: 4 if at < step else 4.5), "bits"),
        (lambda step: TopKCompressor(density=lambda at: 0.1 if at < step else 0.0), "density"),
        (lambda step: AdaCompCompressor(bin_size=lambda at: 50 if at < step else 0), "bin_size"),
    ],
)
def test_schedules_that_lead_to_no_rate_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(0)
    with pytest.raises(ValueError, match=message):
        run(make(3), [random(40, 50)], step=3)
