"""Trains in DistributedDataParallel under torchrun; rank 1 fails in the way that the argument names, the others go on.

With "resume" it is killed, once, and all go on from what every rank has saved after each step.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from mpi_tests import no_compiler

no_compiler.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from hvd_compress import Compression, ddp  # noqa: E402

torch.set_num_threads(1)
how, *directory = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
odd = rank == 1
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
model = DistributedDataParallel(net)
compression = Compression.topk(net.named_parameters(), density=0.02 if odd and how == "mismatch" else 0.01)
model.register_comm_hook(compression, ddp.hook)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
print(f"training starts at {time.time():.3f}", flush=True)


def fail() -> None:
    if how == "exception":
        raise RuntimeError("something is wrong with the data")
    if how == "exit":
        sys.exit(3)
    if how == "kill-in-backward":
        net[0].weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
    if how == "kill-while-others-wait" or (how == "resume" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)


def digest(tensors: dict) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()[:16]


steps, saved = range(1000), None
if directory:
    steps, saved = range(8), Path(directory[0]) / f"{rank}.pt"
    if saved.exists():
        step, parameters, momentum, state = torch.load(saved)
        net.load_state_dict(parameters)
        optimizer.load_state_dict(momentum)
        compression.load_state_dict(state)
        steps = range(step + 1, 8)
for step in steps:
    if odd and step == 4:
        if how == "return":
            break
        fail()
    optimizer.zero_grad()
    batch = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + rank))
    model(batch).pow(2).mean().backward()
    optimizer.step()
    if saved:
        kept = step, net.state_dict(), optimizer.state_dict(), compression.state_dict()
        torch.save(kept, saved.with_suffix(".new"))
        dist.barrier()  # so that all files are of one step
        saved.with_suffix(".new").replace(saved)
        dist.barrier()
residuals = compression.state_dict()["residuals"][rank]
print(f"after {step}: parameters {digest(net.state_dict())}, residuals {digest(residuals)}", flush=True)
dist.destroy_process_group()
