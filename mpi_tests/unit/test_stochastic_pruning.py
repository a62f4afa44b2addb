"""Stochastic pruning of what is sent: the rule, its bytes, and the threshold that finds its place."""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress import kernels, wire
from hvd_compress.compressors import StochasticPruningCompressor
from hvd_compress.compressors.stochastic_pruning import calibrated, normal_threshold
from hvd_compress.local import LocalRanks
from hvd_compress.schedules import Steps

from .drive import PRUNED, bits, bound, random, run
from .test_contract import TENSORS

# Worked by hand, with sigma = sqrt(pi / 2) * mean |g| = 0.0416100293588746.
GRADIENT = [0.01, -0.02, 0.005, 0.03, -0.015, 0.0, 0.08, -0.05, 0.002, -0.12]
UNIFORM = [0.5, 0.9, 0.1, 0.3, 0.2, 0.4, 0.6, 0.8, 0.05, 0.7]
LOW, HIGH = 0.028065538307918955, 0.0684424077085021
WORKED = {
    0.5: (LOW, [0, 0, LOW, 0.03, -LOW, 0, 0.08, -0.05, LOW, -0.12], 4),
    0.9: (HIGH, [0, 0, 0, HIGH, -HIGH, 0, 0.08, 0, 0, -0.12], 2),
}


def uniform_bits(values):
    return torch.tensor([round(value * 2**24) for value in values], dtype=torch.int32)


@pytest.mark.parametrize("rate", WORKED)
def test_a_worked_example(rate):
    threshold, pruned, exact = WORKED[rate]
    gradient = torch.tensor(GRADIENT)
    assert normal_threshold(float(gradient.abs().mean()), rate) == pytest.approx(threshold, rel=1e-7)
    payload, below = kernels.encode_pruned(gradient, threshold, uniform_bits(UNIFORM))
    assert below == 10 - exact
    assert payload.numel() == 4 + 32 + 4 * exact
    assert torch.allclose(kernels.decode_pruned(payload, 10), torch.tensor(pruned, dtype=torch.float32), rtol=1e-6)


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 1.0])
def test_what_is_decoded_is_what_pruning_gives(tensor, quantile):
    values = tensor.reshape(-1)
    threshold = float(values.abs().quantile(quantile)) if values.numel() else 1.0
    stream = kernels.random_bits(values.numel(), 7)
    payload, below = kernels.encode_pruned(values, threshold, stream)
    decoded = kernels.decode_pruned(payload, values.numel())
    small = values.abs() < threshold
    assert torch.equal(decoded[~small], values[~small])  # exactly
    limit = torch.tensor(threshold, dtype=torch.float32)
    survives = stream.float() * 2.0**-24 * limit < values.abs()
    assert torch.equal(decoded[small], (values.sign() * limit * survives)[small])
    assert below == values.numel() - int(((values.abs() >= limit) & (values != 0)).sum())
    assert payload.numel() == 4 + 32 * math.ceil(values.numel() / 128) + 4 * (values.numel() - below)


def test_it_is_right_on_average_with_the_variance_that_follows_from_the_rule():
    gradient, seeds = random(500, seed=3), 4000
    threshold = torch.tensor(normal_threshold(float(gradient.abs().double().mean()), 0.9), dtype=torch.float32)
    total = torch.zeros(500, dtype=torch.float64)
    for seed in range(seeds):
        (sent,) = run(PRUNED["stochastic_pruning"], [gradient], seed=seed).totals
        total += sent
    magnitude = gradient.abs().double()
    variance = (magnitude * (threshold - magnitude)).clamp(min=0)
    deviation = (total / seeds - gradient.double()).abs()
    assert bool((deviation <= 5 * (variance / seeds).sqrt() + 1e-6).all())
    measured = float((deviation**2).sum() / (variance / seeds).sum())
    assert measured == pytest.approx(1, abs=0.4)  # 450 elements: a standard deviation of less than 0.1


def test_what_is_not_below_the_threshold_is_sent_exactly():
    gradient = random(40, 50)
    outcome = run(PRUNED["stochastic_pruning"], [gradient])
    threshold = float(outcome.parsed()[0].payload[:4].view(torch.float32))
    exact = gradient.view(-1).abs() >= threshold
    assert 100 < int(exact.sum()) < 400
    assert torch.equal(outcome.totals[0][exact], gradient.view(-1)[exact])
    assert set(outcome.totals[0][~exact].abs().tolist()) == {0.0, threshold}


DISTRIBUTIONS = {
    "normal": lambda generator: torch.randn(100, 200, generator=generator),
    "cubed": lambda generator: torch.randn(100, 200, generator=generator).pow(3),
    "exponential": lambda generator: torch.empty(100, 200).exponential_(generator=generator),
    "uniform": lambda generator: torch.rand(100, 200, generator=generator) - 0.5,
}


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("draw", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_the_threshold_finds_the_fraction_that_is_asked_for(draw, rate):
    (compression,) = (
        ranks := LocalRanks([bound(StochasticPruningCompressor(rate=rate), {"w": (100, 200)})])
    ).compressions
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(150):
        gradient = draw(generator)
        (result,) = ranks.exchange([{"w": gradient}])
        found.append(1 - int((result["w"] == gradient).sum() - (gradient == 0).sum()) / gradient.numel())
    assert found[-1] == pytest.approx(rate, abs=0.015)
    assert sum(found[-10:]) / 10 == pytest.approx(rate, abs=0.008)
    compression.settle()
    assert compression.memory.residuals["w/threshold"].shape == (1,)


def test_the_calibration_stays_where_it_is_right_and_within_bounds():
    assert calibrated(1.7, 0.9, 900, 1000) == pytest.approx(1.7)
    assert calibrated(1.0, 0.9, 950, 1000) < 1 < calibrated(1.0, 0.9, 800, 1000)
    for below in (0, 1000):
        factor = 1.0
        for _ in range(100):
            factor = calibrated(factor, 0.9, below, 1000)
        assert factor == (8 if below == 0 else 1 / 8)
    for numel in (1, 2):
        for below in range(numel + 1):
            assert 1 / 8 <= calibrated(1.0, 0.9, below, numel) <= 8


def test_the_loss_scale_changes_nothing_but_the_scale():
    shapes = {"w": (30, 40)}
    plain, scaled = (LocalRanks([bound(PRUNED["stochastic_pruning"], shapes) for _ in range(2)]) for _ in range(2))
    for step in range(6):
        scale = 1024.0 if step < 3 else 256.0
        for compression in scaled.compressions:
            compression.loss_scale = scale
        gradients = [{"w": random(30, 40, seed=2 * step + rank)} for rank in range(2)]
        expected = plain.exchange(gradients)[0]["w"]
        found = scaled.exchange([{"w": scale * mine["w"]} for mine in gradients])[0]["w"]
        assert bits(found / scale) == bits(expected)


def test_the_rate_may_be_a_schedule():
    ranks = LocalRanks([bound(StochasticPruningCompressor(rate=Steps((0, 0.5), (5, 0.95))), {"w": (100, 200)})])
    sent = []
    for step in range(10):
        (compression,) = ranks.compressions
        compression.telemetry.reset()
        ranks.exchange([{"w": torch.randn(100, 200, generator=torch.Generator().manual_seed(step))}])
        sent.append(compression.telemetry.total.sent_bytes)
    assert min(sent[:5]) > 4 * max(sent[5:])


def test_a_rank_sends_less_the_more_is_below():
    gradient = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    for rate, ratio in ((0.9, 6.1), (0.99, 13.5)):
        (sent,) = run(StochasticPruningCompressor(rate=rate), [gradient]).sent_bytes
        assert 4 * gradient.numel() / sent == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan])
def test_a_rate_that_is_no_fraction_is_refused(rate):
    with pytest.raises(ValueError, match="rate must be"):
        StochasticPruningCompressor(rate=rate)


def spoilt(how):
    payload, _ = kernels.encode_pruned(random(300), 1.0, kernels.random_bits(300, 1))
    if how == "short":
        return payload[:-4]
    if how == "long":
        return torch.cat([payload, torch.zeros(4, dtype=torch.uint8)])
    if how == "odd":
        return payload[:-1]
    if how == "no codes":
        return payload[:40]
    payload[:4] = torch.tensor([math.nan if how == "threshold" else -1.0]).view(torch.uint8)
    return payload


@pytest.mark.parametrize("how", ["short", "long", "odd", "no codes", "threshold", "negative"])
def test_a_payload_that_does_not_fit_is_an_error_that_names_its_sender(how):
    def tamper(frames):
        parsed = wire.unpack(frames[1], 1)
        return [frames[0], wire.pack(wire.Frame(**(vars(parsed) | {"payload": spoilt(how)})))]

    with pytest.raises(wire.WireError, match="from rank 1"):
        run(PRUNED["stochastic_pruning"], [random(300), random(300, seed=1)], tamper=tamper)
