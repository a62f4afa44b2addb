"""Rank 1 leaves while rank 0 posts one operation after another, and never waits: the job ends all the same."""

import sys
import time

import torch
from backend import RANK, start

from hvd_compress.transports.horovod import HorovodTransport

OPERATIONS = 300  # a round
LEAVES_AT = 1  # rounds
BUSY_SECONDS = 1e-3  # between two operations, in Python: less than Python lets another thread wait

transport = HorovodTransport()
frame = torch.zeros(64, dtype=torch.uint8)
start()
for number in range(1000):
    if RANK == 1 and number == LEAVES_AT:
        time.sleep(OPERATIONS * BUSY_SECONDS / 3)
        sys.exit(3)
    pending = []
    for operation in range(OPERATIONS):
        pending.append(transport.allgather(f"operation.{operation}", [frame]))
        until = time.perf_counter() + BUSY_SECONDS
        while time.perf_counter() < until:
            pass
    for each in pending:
        each.wait()
