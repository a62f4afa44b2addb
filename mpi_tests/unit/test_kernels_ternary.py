"""Ternary codes: the published examples, unbiasedness, and the packing bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hvd_compress import wire
from hvd_compress.compressors.terngrad import clipping_bound
from hvd_compress.kernels import (
    pack_ternary,
    random_bits,
    stream_key,
    ternarize,
    ternary_bytes,
    unpack_ternary,
)

from .drive import TERNGRAD, random, run

G1 = [0.02, -0.01, 0.03, -0.02, 0.01, 0.0, -0.03, 0.02, -0.01, 0.5]
G2 = [-0.04, 0.01, 0.02, 0.0, -0.03, 0.05, 0.01, -0.02, 0.04, 0.3]
U1 = [0.05, 0.4, 0.1, 0.02, 0.3, 0.5, 0.01, 0.9, 0.03, 0.7]
U2 = [0.08, 0.6, 0.04, 0.2, 0.07, 0.1, 0.9, 0.03, 0.5, 0.2]
S1, S2 = 0.37690350223896835, 0.2318943725061046
G3 = [0.4, -0.1, 0.05, 0.3, -0.25, 0.02, -0.6, 0.1, 0.0, 0.15]
U3 = [0.62, 0.16, 0.05, 0.48, 0.4, 0.02, 0.93, 0.155, 0.5, 0.235]


def codes_of(gradient: list[float], uniforms: list[float], scaler: float) -> list[int]:
    bits = torch.tensor([round(u * 2**24) for u in uniforms], dtype=torch.int32)
    codes = ternarize(torch.tensor(gradient), scaler, bits)
    return [(0, 1, -1)[code] for code in codes.tolist()]


@pytest.mark.parametrize(("gradient", "scaler"), [(G1, S1), (G2, S2), (G3, 0.6)])
def test_scalers_are_those_of_the_worked_examples(gradient, scaler):
    """Two have an outlier beyond 2.5 standard deviations, .15076140 and .09275775; the third, .26784510, has none."""
    assert clipping_bound(torch.tensor(gradient), 2.5) == pytest.approx(scaler, rel=1e-7)


@pytest.mark.parametrize(
    ("gradient", "uniforms", "scaler", "codes"),
    [
        (G1, U1, S1, [1, 0, 0, -1, 0, 0, -1, 0, 0, 1]),
        (G2, U2, S1, [-1, 0, 1, 0, -1, 1, 0, -1, 0, 1]),
        (G3, U3, 0.6, [1, -1, 1, 1, -1, 1, -1, 1, 0, 1]),
        (G3, U3, 0.669612761228458, [0, 0, 1, 0, 0, 1, 0, 0, 0, 0]),
    ],
    ids=["outlier 1", "outlier 2", "no outlier", "no outlier, larger scaler"],
)
def test_codes_are_those_of_the_worked_examples(gradient, uniforms, scaler, codes):
    clipped = [max(-scaler, min(scaler, value)) for value in gradient]
    assert codes_of(clipped, uniforms, scaler) == codes


def test_the_average_is_that_of_the_worked_example():
    total = torch.zeros(10)
    for gradient, uniforms in ((G1, U1), (G2, U2)):
        bits = torch.tensor([round(u * 2**24) for u in uniforms], dtype=torch.int32)
        clipped = torch.tensor(gradient).clamp(-S1, S1)
        total += unpack_ternary(pack_ternary(ternarize(clipped, S1, bits)), 10, S1)
    half = 0.18845175111948417
    expected = [0.0, 0.0, half, -half, -half, half, -half, -half, 0.0, 0.37690350223896835]
    assert (total / 2).tolist() == pytest.approx(expected, rel=1e-7)


def test_all_ranks_use_the_largest_scaler_of_the_worked_example():
    gradients = [torch.tensor(values * 13) for values in (G1, G2)]  # as often: the same standard deviation
    outcome = run(TERNGRAD["terngrad"], gradients)
    assert [frame.payload[:4].view(torch.float32).item() for frame in outcome.parsed()] == [
        pytest.approx(S1, rel=1e-7)
    ] * 2
    outcome = run(TERNGRAD["terngrad_local"], gradients)
    scalers = [frame.payload[:4].view(torch.float32).item() for frame in outcome.parsed()]
    assert scalers == pytest.approx([S1, S2], rel=1e-7)


@pytest.mark.parametrize("numel", [1, 2, 7, 8, 20])
def test_no_value_about_a_zero_mean_is_clipped_among_up_to_seven(numel):
    """The largest deviation of n values is sqrt(n - 1) standard deviations: below 2.5 up to n = 7."""
    gradient = torch.full((numel,), -0.1)
    gradient[0] = 0.1 * (numel - 1) or 0.1
    sigma = 0.1 * math.sqrt(numel - 1)
    expected = float(gradient[0]) if numel <= 7 else 2.5 * sigma
    assert clipping_bound(gradient, 2.5) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [0.1, -3e38, 2e-38, 1e-20], ids=str)
@pytest.mark.parametrize("numel", [1, 10, 12_345])
def test_constant_gradients_keep_their_size(value, numel):
    gradient = torch.full((numel,), value)
    assert clipping_bound(gradient, 2.5) == gradient.abs()[0]
    assert (
        ternarize(gradient, float(gradient.abs()[0]), random_bits(numel, 1)).tolist() == [2 if value < 0 else 1] * numel
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip_sigma", [None, 2.5])
def test_the_bound_of_a_non_finite_gradient_is_infinite(bad, clip_sigma):
    assert clipping_bound(torch.tensor([1.0, bad, 2.0]), clip_sigma) == math.inf


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20, 1e-33, 1e-37, 2.0**-130, 2.0**-140], ids=str)
def test_codes_are_unbiased_with_the_variance_of_a_coin(scale):
    """scaler * code has mean g and variance |g| (scaler - |g|): over many draws, within five standard errors."""
    ratios = torch.tensor([0.0, 0.1, -0.25, 0.5, -0.75, 0.9, 1.0, -1.0], dtype=torch.float64)
    scaler = float(torch.tensor(scale, dtype=torch.float64).float())
    gradient = (ratios * scaler).float()
    draws = 40_000
    bits = random_bits(draws * 8, stream_key(11))
    codes = ternarize(gradient.repeat(draws), scaler, bits).view(draws, 8)
    signed = torch.where(codes == 2, -1, codes).double()
    exact = gradient.double() / scaler
    variance = exact.abs() * (1 - exact.abs())
    # Besides, uniforms have 24 bits, and products with a denormal scaler are rounded to 2**-149.
    slack = 2.0**-24 + 2.0**-149 / scaler
    assert bool(((signed.mean(0) - exact).abs() <= 5 * (variance / draws).sqrt() + slack).all())
    spread = (variance * (1 - 3 * variance)).clamp(min=0) + 1e-4  # fourth moment of a coin, roughly from above
    assert bool(((signed.var(0) - variance).abs() <= 8 * (spread / draws).sqrt() + 2 * slack).all())


@pytest.mark.parametrize("name", ["terngrad_unclipped", "terngrad_local_unclipped"])
def test_the_mean_over_seeds_is_the_gradient(name):
    """The whole exchange of two ranks, which draw by the same numbers and their opposites.

    Of the probabilities p, q that they send an element: where signs differ both send it in min(p, q) of all cases, and
    it cancels; where they are equal, in max(0, p + q - 1).
    """
    gradients = [random(300, seed=rank) for rank in range(2)]
    seeds = 2000
    totals = torch.zeros(300, dtype=torch.float64)
    squares = torch.zeros(300, dtype=torch.float64)
    for seed in range(seeds):
        total = run(TERNGRAD[name], gradients, seed=seed).totals[0].double()
        totals += total
        squares += total * total
    exact = torch.stack(gradients).double().sum(0)
    scalers = [float(gradient.abs().max()) for gradient in gradients]
    if TERNGRAD[name].share_scaler:
        scalers = [max(scalers)] * 2
    variance = sum(g.double().abs() * (s - g.double().abs()) for g, s in zip(gradients, scalers))
    p, q = (g.double().abs() / s for g, s in zip(gradients, scalers))
    covariance = torch.where(gradients[0] * gradients[1] < 0, p * q - p.minimum(q), (p + q - 1).clamp(min=0) - p * q)
    alone, variance = variance, variance + 2 * scalers[0] * scalers[1] * covariance
    assert float(variance.sum() / alone.sum()) < 0.9
    assert bool(((totals / seeds - exact).abs() <= 5 * (variance / seeds).sqrt() + 1e-6).all())
    measured = squares / seeds - (totals / seeds) ** 2
    assert float(measured.sum() / variance.sum()) == pytest.approx(1, abs=0.03)


def test_steps_draw_anew():
    gradient = random(3000)
    totals = [run(TERNGRAD["terngrad_unclipped"], [gradient], step=step).totals[0] for step in range(3)]
    assert not torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[1], totals[2])


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 127, 128, 129, 1000, 65_537])
def test_packing_is_undone_by_unpacking(numel):
    codes = torch.randint(0, 3, (numel,), dtype=torch.int32, generator=torch.Generator().manual_seed(numel))
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.numel() == ternary_bytes(numel) == 32 * math.ceil(numel / 128)
    values = unpack_ternary(packed, numel, 2.5)
    assert torch.equal(values, torch.tensor([0.0, 2.5, -2.5])[codes])


def test_an_element_stands_where_the_layout_says():
    for element in range(300):
        for code in (1, 2):
            codes = torch.zeros(300, dtype=torch.int32)
            codes[element] = code
            words = np.frombuffer(pack_ternary(codes).numpy().tobytes(), dtype="<u4")
            block, within = divmod(element, 128)
            expected = np.zeros(24, dtype=np.uint32)
            expected[8 * block + within % 8] = code << (2 * (within // 8))
            assert np.array_equal(words, expected)


def test_the_unused_code_is_loud():
    values = unpack_ternary(torch.full((32,), 255, dtype=torch.uint8), 128, 1.0)
    assert bool(values.isnan().all())


def test_a_payload_of_the_wrong_length_is_an_error():
    def shorten(frames):
        parsed = wire.unpack(frames[0], 0)
        return [wire.pack(wire.Frame(**(vars(parsed) | {"payload": parsed.payload[:-4]})))]

    with pytest.raises(wire.WireError, match="bytes instead of"):
        run(TERNGRAD["terngrad"], [random(300)], tamper=shorten)
