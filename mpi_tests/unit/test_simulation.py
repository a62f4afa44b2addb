"""Whole runs against a plain model of what should happen: any gradients, any order, bad steps, new loss scales."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hvd_compress.local import LocalRanks

from .drive import EVERY, bits, bound, run
from .drive import random as gradient_like

SHAPES = {"embed": (50, 30), "bias": (50,), "conv": (8, 6, 3, 3), "tiny": (2, 2), "head": (40, 25), "gain": (3,)}
INDEX = {name: index for index, name in enumerate(SHAPES)}
SMALL = {"bias", "gain"}


class Model:
    """What every rank should have after every step, without buckets, rounds or generators that wait."""

    def __init__(self, compressor, size: int) -> None:
        self.compressor, self.size = compressor, size
        self.residuals = [{} for _ in range(size)]
        self.number = 0

    def step(self, gradients: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        results, outcomes, finite = {}, {}, True
        for name in gradients[0]:
            compressor = EVERY["none"] if name in SMALL and self.compressor not in plain() else self.compressor
            outcome = run(
                compressor,
                [mine[name] for mine in gradients],
                name=name,
                index=INDEX[name],
                step=self.number,
                residuals=[residuals.get(name) for residuals in self.residuals],
            )
            total = outcome.totals[0]
            results[name] = torch.full((1,), math.nan) if total is None else total / self.size
            finite = finite and bool(torch.isfinite(results[name]).all())
            outcomes[name] = outcome
        for name, outcome in outcomes.items():
            for residuals, memory in zip(self.residuals, outcome.memories):
                if finite:
                    memory.commit()
                if name in memory.residuals:
                    residuals[name] = memory.residuals[name]
        self.number += 1
        return results


def plain():
    return (EVERY["none"], EVERY["fp16"])


@pytest.mark.parametrize("name", ["none", "bf16", "terngrad", "terngrad_local", "adacomp_5", "adacomp", "topk_0.3"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 7000, 1 << 20])
def test_a_run_is_what_the_model_says(name, size, bucket_bytes):
    draw = random.Random(f"{name} {size} {bucket_bytes}")
    compressor = EVERY[name]
    ranks = LocalRanks([bound(compressor, SHAPES, bucket_bytes=bucket_bytes) for _ in range(size)])
    model = Model(compressor, size)
    scale = 1.0
    bad_steps = 0
    for step in range(14):
        if draw.random() < 0.3:
            scale *= draw.choice([0.5, 2.0])
        names = [name for name in SHAPES if draw.random() < 0.8] or ["head"]
        gradients = []
        for rank in range(size):
            order = draw.sample(names, len(names))
            seeds = {name: 1000 * step + 10 * rank + INDEX[name] for name in order}
            gradients.append({name: gradient_like(*SHAPES[name], seed=seeds[name], scale=scale) for name in order})
        if draw.random() < 0.25:
            victim = draw.choice(gradients)[draw.choice(names)].view(-1)
            victim[draw.randrange(victim.numel())] = draw.choice([math.nan, math.inf, -math.inf])
            bad_steps += 1
        for compression in ranks.compressions:
            before = compression.loss_scale
            compression.loss_scale = scale
        if before is not None:
            for residuals in model.residuals:
                for name in residuals:
                    residuals[name] = residuals[name] * (scale / before)
        expected = model.step([{name: mine[name] for name in names} for mine in gradients])
        for result in ranks.exchange(gradients):
            assert result.keys() == set(names)
            for name in names:
                if bool(torch.isfinite(expected[name]).all()):
                    assert bits(result[name]) == bits(expected[name])
                else:
                    assert not bool(torch.isfinite(result[name]).all())
        for compression, residuals in zip(ranks.compressions, model.residuals):
            compression.settle()
            found = compression.memory.residuals
            assert {name: bits(found[name]) for name in found} == {name: bits(r) for name, r in residuals.items()}
    assert bad_steps
    assert ranks.compressions[0].progress == (14, scale)
