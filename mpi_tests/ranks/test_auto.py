"""Compression.auto on every back end: all ranks change the method in the same steps, and replicas stay equal."""

from __future__ import annotations

import torch

from hvd_compress import Compression

from .job import Job
from .training import assert_close, assert_replicated, backward, copy, gradients, grads, parameters, sgd


def test_ranks_change_together_and_replicas_stay_equal(job: Job) -> None:
    of = parameters({"a": (60, 50), "b": (40, 40), "bias": (7,)})
    compression = Compression.auto(of.items(), interval=6, steps=3, rounds=1)
    optimizer = job.distribute(sgd(of), of.items(), compression)
    seen = []
    for step in range(20):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        seen.append(compression.compressor.choice.index)
        if seen[-1] == 0:
            every = [gradients(of, rank, step) for rank in range(job.size)]
            mean = {name: torch.stack([mine[name] for mine in every]).mean(0) for name in of}
            assert_close(grads(of), mean, 1e-6)
    assert_replicated(job, copy(of))
    assert len({str(theirs) for theirs in job.allgather(seen)}) == 1
    if job.size > 1:
        assert seen[:9] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert seen[15:18] == [0, 0, 0]  # the next trial
        assert compression.controller.number == 1
    else:
        assert seen == [0] * 20
