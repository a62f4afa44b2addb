"""One rank of the soak: soak_worker.py STEPS CHECKS --out FILE; a small model under mpi4py."""

from __future__ import annotations

import argparse
import gc
import hashlib
import time
from pathlib import Path

import torch
from mpi4py import MPI
from torch import nn

from hvd_compress import Compression
from hvd_compress.mpi import DistributedOptimizer, broadcast_parameters
from report import write_rows


def resident_bytes() -> int:
    """Of this process."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return 1024 * int(kilobytes)


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method")
    parser.add_argument("steps", type=int)
    parser.add_argument("checks", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    comm = MPI.COMM_WORLD
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    compression = getattr(Compression, options.method)(model.named_parameters())
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), list(model.named_parameters()), compression
    )
    broadcast_parameters(model.state_dict())
    generator = torch.Generator().manual_seed(100 + comm.rank)
    rows, started = [], time.monotonic()
    for step in range(1, options.steps + 1):
        batch = torch.randn(16, 64, generator=generator)
        optimizer.zero_grad()
        (model(batch) - batch[:, :10]).pow(2).mean().backward()
        optimizer.step()
        if step % max(options.steps // options.checks, 1) == 0:
            gc.collect()
            said = comm.allgather((digest(model), resident_bytes()))
            rows.append(
                {
                    "method": options.method,
                    "step": step,
                    "equal": len({bits for bits, _ in said}) == 1,
                    "resident_bytes": max(resident for _, resident in said),
                    "seconds": time.monotonic() - started,
                }
            )
    if comm.rank == 0:
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
