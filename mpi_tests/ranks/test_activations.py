"""Compressed activations on several ranks: replicas stay equal, and rank 0 chooses bits for all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvd_compress import Compression
from hvd_compress.activations import CompressedActivations

from .job import Job
from .training import assert_replicated, copy


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.LayerNorm(128), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 8)]
    return nn.Sequential(*layers)


def loss(of: nn.Module, rank: int, step: int) -> Tensor:
    inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(1000 * rank + step))
    return nn.functional.mse_loss(of(inputs), inputs[:, :8])


def test_replicas_train_alike_and_rank_0_chooses_bits_for_all(job: Job) -> None:
    of = model()
    optimizer = torch.optim.SGD(of.parameters(), lr=0.05)
    optimizer = job.distribute(optimizer, of.named_parameters(), Compression.topk(of.named_parameters(), density=0.1))
    first = float(loss(of, job.rank, 0).detach())
    with CompressedActivations(of, seed=job.rank) as activations:
        for step in range(12):
            if step == 4:  # in the midst of training, when an optimizer watches the gradients
                chosen = activations.choose_bits(lambda step=step: loss(of, job.rank, step), over=job.transport())
                assert len({str(theirs) for theirs in job.allgather(chosen)}) == 1
                assert len(set(chosen.values())) > 1
            optimizer.zero_grad()
            loss(of, job.rank, step).backward()
            optimizer.step()
        assert activations.saved.ratio > 6
    assert_replicated(job, copy(dict(of.named_parameters())))
    assert float(loss(of, job.rank, 0).detach()) < 0.95 * first
