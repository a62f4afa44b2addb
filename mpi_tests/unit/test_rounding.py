"""Ranks round in pairs, by random numbers and their opposites: each as it would, both together more exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_compress.compressors import QSGDCompressor

from .drive import run

SEEDS, NUMEL, BUCKET = 1000, 2048, 128


def levels(gradient: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """How far apart the levels about each element are, and how far above the lower one it is, as a part of that."""
    buckets = gradient.double().view(-1, BUCKET)
    norms = buckets.abs().amax(1, keepdim=True)
    units = 2 * norms if bits == 1 else norms / (2 ** (bits - 1) - 1)
    above = (buckets + norms) / units
    return units.expand_as(buckets).reshape(-1), (above - above.floor()).view(-1)


def variances(gradients: list[Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Of the sum over ranks that draw for themselves, and over ranks that draw in pairs."""
    found = [levels(gradient, bits) for gradient in gradients]
    alone = sum((unit**2 * part * (1 - part) for unit, part in found), torch.zeros(NUMEL, dtype=torch.float64))
    paired = alone
    for (u, f), (v, g) in zip(found[::2], found[1::2]):  # both are rounded up in f + g - 1 of all cases, or none
        paired = paired + 2 * u * v * ((f + g - 1).clamp(min=0) - f * g)
    return alone, paired


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sums_are_unbiased_and_err_less_than_those_of_ranks_that_draw_for_themselves(bits, ranks):
    gradients = list(torch.randn(ranks, NUMEL, generator=torch.Generator().manual_seed(bits)))
    exact = torch.stack(gradients).double().sum(0)
    compressor = QSGDCompressor(bits=bits, bucket_size=BUCKET)
    off = torch.stack([run(compressor, gradients, seed=seed).totals[0].double() - exact for seed in range(SEEDS)])
    alone, paired = variances(gradients, bits)
    rare = 5 * max(float(levels(gradient, bits)[0].max()) for gradient in gradients) / SEEDS  # a few times in all
    assert bool((off.mean(0).abs() <= 5 * (paired / SEEDS).sqrt() + rare).all())
    assert float(off.var(0).sum() / paired.sum()) == pytest.approx(1, abs=0.02)
    gain = 1 - float(paired.sum() / alone.sum())
    pairs = 2 * (ranks // 2) / ranks
    # Parts that are uniform: E[max(0, f + g - 1) - f g] is -1/12, half of E[f (1 - f)].
    assert gain == pytest.approx(0.5 * pairs, abs=0.03) if bits in (4, 8) else gain >= 0.25 * pairs
