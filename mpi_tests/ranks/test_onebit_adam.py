"""1-bit Adam on every back end: the same bits on all ranks, those of the simulation; other optimizers are refused."""

import pytest
import torch

from hvd_compress import Compression, step_check
from hvd_compress.optim import OneBitAdam

from .job import Job
from .test_replicas import loss, model
from .training import OPTIONS, Simulation, assert_close, assert_equal, assert_replicated, copy

WARMUP_STEPS, STEPS = 3, 8


def onebit(named):
    return Compression.onebit(named, momentum=0.9, warmup_steps=WARMUP_STEPS, **OPTIONS)


def test_replicas_stay_equal_and_match_the_simulation(job: Job) -> None:
    mine = model()
    named = dict(mine.named_parameters())
    compression = onebit(named.items())
    inner = OneBitAdam(mine.parameters(), lr=1e-2, weight_decay=0.01, compression=compression)
    optimizer = job.distribute(inner, named.items(), compression)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(mine, job.rank, step).backward()
        optimizer.step()
        if job.size > 1:
            given = {name: compression.gives_momentum(p) for name, p in named.items()}
            assert set(given.values()) == {step >= WARMUP_STEPS}, given
    assert_replicated(job, named)

    one = model()
    by_name = dict(one.named_parameters())
    simulation = Simulation(job.size, onebit, by_name)
    alone = simulation.compression if job.size > 1 else None
    optimizer = OneBitAdam(one.parameters(), lr=1e-2, weight_decay=0.01, compression=alone)
    for step in range(STEPS):
        of_ranks = []
        for rank in range(job.size):
            optimizer.zero_grad()
            loss(one, rank, step).backward()
            of_ranks.append({name: p.grad.clone() for name, p in by_name.items()})
        for name, combined in simulation.exchange(of_ranks).items():
            by_name[name].grad = combined
        optimizer.step()
    # In the warm-up gradients are added up by the back end, in an order of its own.
    (assert_equal if job.size == 1 else assert_close)(named, copy(by_name))


def test_an_optimizer_that_takes_momentum_for_gradients_is_refused(several: Job) -> None:
    job = several
    mine = model()
    named = list(mine.named_parameters())
    with pytest.raises(ValueError, match=r"AdamW takes it for gradients.*OneBitAdam"):  # noqa: PT012
        optimizer = job.distribute(torch.optim.AdamW(mine.parameters()), named, onebit(named))
        loss(mine, job.rank, 0).backward()
        optimizer.step()
    job.barrier()


def test_a_sparse_method_with_adam_is_told_on_rank_0_alone(several: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job = several
    said: list[str] = []
    monkeypatch.setattr(step_check, "warn_once", said.append)
    mine = model()
    named = list(mine.named_parameters())
    compression = Compression.topk(named, density=0.1, **OPTIONS)
    optimizer = job.distribute(torch.optim.Adam(mine.parameters()), named, compression)
    for step in range(2):
        optimizer.zero_grad()
        loss(mine, job.rank, step).backward()
        optimizer.step()
    assert ["Adam" in text for text in said] == [True] * (job.rank == 0)
