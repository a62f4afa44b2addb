"""Trains by AC/DC, a dense and a compressed phase, and says what the loopback interface carried in each."""

from pathlib import Path

import backend
import torch

from hvd_compress import Compression
from hvd_compress.training import ACDC, Schedule

WARM, STEPS = 2, 5


def carried_bytes() -> int:
    """By the loopback interface of this network namespace, which has no other traffic than the job's."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[0])


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
