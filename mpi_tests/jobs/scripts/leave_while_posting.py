"""Rank 1 leaves while rank 0 posts one operation after another, and never waits: the job ends all the same.

leave_while_posting.py horovod transport|optimizer: posted by this library, or by Horovod's optimizer for it.
"""

import functools
import sys
import time

import horovod.torch as hvd
import torch
from backend import RANK, start
from horovod.torch import optimizer as hvd_optimizer

from hvd_compress import Compression
from hvd_compress.transports.horovod import HorovodTransport

OPERATIONS = 300  # a round
BUSY_SECONDS = 1e-3  # before each, in Python: less than Python lets another thread wait

leaves = False


def busily(post):
    """As where the machine is busy: it takes long from the last line of Python to the first of Horovod."""

    @functools.wraps(post)
    def posting(*args, **options):
        until = time.perf_counter() + BUSY_SECONDS
        while time.perf_counter() < until:
            pass
        if leaves and RANK == 1:
            sys.exit(3)
        return post(*args, **options)

    return posting


def by_transport():
    hvd.allgather_async = busily(hvd.allgather_async)
    transport, frame = HorovodTransport(), torch.zeros(64, dtype=torch.uint8)

    def posted():
        return [transport.allgather(f"operation.{number}", [frame]) for number in range(OPERATIONS)]

    return posted, lambda pending: [each.wait() for each in pending]


def by_optimizer():
    hvd_optimizer.allreduce_async_ = busily(hvd_optimizer.allreduce_async_)
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(OPERATIONS)))
    compression = Compression.topk(layers.named_parameters(), density=0.5, min_numel=1)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(optimizer, layers.named_parameters(), compression=compression)

    def posted():
        optimizer.zero_grad()
        layers(torch.randn(4, 8)).sum().backward()

    return posted, lambda _: optimizer.step()


post, wait = {"transport": by_transport, "optimizer": by_optimizer}[sys.argv[2]]()
start()
for number in range(1000):
    leaves = number == 1
    wait(post())
