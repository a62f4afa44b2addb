"""AC/DC over a distributed optimizer: the same masks and weights on every rank, over three cycles of phases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hvd_compress.training import ACDC, Schedule

from .job import Job
from .training import COMPRESSIONS, assert_replicated

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}
SCHEDULE = Schedule((1, 1, 1, 1, 1, 1))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 5))


def train_step(model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, generator: torch.Generator) -> None:
    images, labels = torch.randn(8, 40, generator=generator), torch.randint(5, (8,), generator=generator)
    optimizer.zero_grad()
    scaler.scale(cross_entropy(model(images), labels)).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize(
    ("optimizer_name", "kind", "mixed_precision"),  # any two of them in all ways
    [("sgd", "none", False), ("sgd", "topk", True), ("adam", "none", True), ("adam", "topk", False)],
)
def test_ranks_prune_alike(job: Job, optimizer_name: str, kind: str, mixed_precision: bool) -> None:
    model = make_model()
    named = list(model.named_parameters())
    optimizer = job.distribute(OPTIMIZERS[optimizer_name](model.parameters()), named, COMPRESSIONS[kind](named))
    acdc = ACDC(model, optimizer, schedule=SCHEDULE, sparsity=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=mixed_precision)
    generator = torch.Generator().manual_seed(job.rank)
    for phase in range(len(SCHEDULE.lengths)):
        acdc.begin(phase)
        for _ in range(3):
            train_step(model, optimizer, scaler, generator)
            if acdc.compressed:
                assert acdc.realised_sparsity() == pytest.approx(0.9, abs=1e-3)
        assert acdc.compressed == (phase % 2 == 1)
        assert len(set(job.allgather(acdc.digest()))) == 1
        assert_replicated(job, model.state_dict())
