"""Trains by AC/DC, a dense and a compressed phase, and says what TCP has carried in each."""

import re
import subprocess

import backend
import torch

from hvd_compress import Compression
from hvd_compress.training import ACDC, Schedule

WARM, STEPS = 2, 5


def carried_bytes() -> int:
    """Payload that was received over all connections of this network namespace, which has none but the job's.

    The interface also counts what is sent twice when a receiver's buffer is full: up to a fiftieth of all.
    """
    told = subprocess.run(["ss", "--tcp", "--info", "--no-header"], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"bytes_received:(\d+)", told)))


def barrier() -> None:
    backend.hvd.barrier() if backend.KIND == "horovod" else backend.MPI.COMM_WORLD.Barrier()


torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000, bias=False) for _ in range(4)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
acdc = ACDC(model, optimizer, schedule=Schedule((1, 1)), sparsity=0.9)
compression = Compression.masked(acdc)
optimizer = backend.distribute(optimizer, list(model.named_parameters()), compression)
backend.start()
for phase in range(2):
    acdc.begin(phase)
    for number in range(WARM + STEPS):
        if number == WARM:
            barrier()
            before = carried_bytes()
            compression.telemetry.reset()
            barrier()
        backend.step(model, optimizer, backend.own_batches())
    barrier()
    if backend.RANK == 0:
        sent = compression.telemetry.total.sent_bytes
        print(f"phase {phase}: carried {carried_bytes() - before}, counted {sent}", flush=True)
    barrier()
