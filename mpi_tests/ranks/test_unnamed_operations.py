"""Operations of the program without a name find their peers, wherever they stand and however late the ranks are.

Horovod names them by a counter of all operations, so every rank must have posted as many before each of them.
"""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch import Tensor

from hvd_compress import Compression
from hvd_compress.training import Masks

from .job import Job
from .training import COMPRESSIONS, assert_replicated, gradients, parameters, sgd

SHAPES = {f"w{number}": (20, 12 + number) for number in range(6)}
STEPS = 6
PLACES = ["before backward", "between backward and step", "in a hook", "between steps"]


def lgreco(base: str):
    def make(named):
        return Compression.lgreco(COMPRESSIONS[base](list(named)), interval=2, window=1, warmup_steps=1)

    return make


METHODS = {
    **COMPRESSIONS,
    "masked": lambda named: Compression.masked(lambda: MASKS[0], list(named), bucket_bytes=1),
    "lgreco-topk": lgreco("topk"),
    "lgreco-powersgd": lgreco("powersgd"),
}
MASKS: list[Masks] = []


def unnamed(job: Job, value: float) -> None:
    if job.is_horovod:
        (total,) = job.hvd.allreduce(torch.tensor([value]), op=job.hvd.Sum).tolist()
    else:
        total = sum(job.allgather(value))
    assert total == value * job.size


def count_alike(job: Job) -> None:
    """Bring Horovod's counters together: in other tests, as of join(), ranks post unequally many operations."""
    if not job.is_horovod:
        return
    hvd, alone = job.hvd, job.split([[rank] for rank in range(job.size)]).of_optimizer["process_set"]

    def counter() -> int:
        handle = hvd.allreduce_async(torch.zeros(1), name="counter", process_set=alone)
        hvd.synchronize(handle)
        return int(handle)

    mine = counter()
    for _ in range(max(job.allgather(mine)) - mine):
        counter()


@pytest.mark.parametrize("kind", METHODS)
def test_operations_without_a_name_find_their_peers(several: Job, kind: str) -> None:
    job = several
    count_alike(job)
    of, late = parameters(SHAPES), random.Random(job.rank)
    MASKS[:] = [Masks()]
    optimizer = job.distribute(sgd(of, momentum=0.0), of.items(), METHODS[kind](of.items()))
    names = list(of)
    in_hook = of[names[2]].register_post_accumulate_grad_hook(lambda _: unnamed(job, 1.0))

    def dawdle(_: Tensor | None = None) -> None:
        time.sleep(late.random() * 0.004)

    sleeping = [p.register_post_accumulate_grad_hook(dawdle) for p in of.values()]
    for step in range(STEPS):
        if step == 3:
            MASKS[0].update({names[1]: torch.arange(20 * 13).view(20, 13) % 3 == 0})
        optimizer.zero_grad()
        known = gradients(of, job.rank, step)
        unnamed(job, 2.0)
        sum((of[name] * known[name]).sum() for name in names).backward()
        unnamed(job, 3.0)
        dawdle()
        optimizer.synchronize()
        unnamed(job, 4.0)
        with optimizer.skip_synchronize():
            optimizer.step()
        unnamed(job, 5.0)
    for hook in [in_hook, *sleeping]:
        hook.remove()
    assert_replicated(job, of)
