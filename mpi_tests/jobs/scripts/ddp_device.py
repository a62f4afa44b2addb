"""Trains on the device that the argument names, cpu or cuda, in DistributedDataParallel alone and with our hook.

torchrun --standalone --nproc-per-node 2 mpi_tests/jobs/scripts/ddp_device.py cuda
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hvd_compress import Compression, ddp

(kind,) = sys.argv[1:]
device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
if kind == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if kind == "cuda" else "gloo")

METHODS = {
    "ddp alone": None,
    "none": lambda named: Compression.none(named),
    "topk of all": lambda named: Compression.topk(named, density=1.0),
    "topk": lambda named: Compression.topk(named, density=0.1),
    "terngrad": lambda named: Compression.terngrad(named),
    "qsgd": lambda named: Compression.qsgd(named),
    "powersgd": lambda named: Compression.powersgd(named),
    "scalecom": lambda named: Compression.scalecom(named, density=0.1),
}
trained = {}
for method, make in METHODS.items():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64)).to(device)
    model = DistributedDataParallel(net, device_ids=[device] if kind == "cuda" else None)
    if make:
        model.register_comm_hook(make(net.named_parameters()), ddp.hook)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(20):
        batch = torch.randn(16, 64, generator=torch.Generator().manual_seed(100 * step + dist.get_rank())).to(device)
        optimizer.zero_grad()
        loss = (model(batch) - batch).square().mean()
        loss.backward()
        optimizer.step()
    trained[method] = torch.cat([p.detach().view(-1) for p in net.parameters()])
    every = [torch.empty_like(trained[method]) for _ in range(dist.get_world_size())]
    dist.all_gather(every, trained[method])
    assert all(torch.equal(every[0], other) for other in every), f"{method}: the replicas differ"
    if dist.get_rank() == 0:
        print(f"{method}: loss {float(loss):.4f}", flush=True)
for method in ("none", "topk of all"):
    torch.testing.assert_close(trained[method], trained["ddp alone"], rtol=1e-5, atol=1e-6)
dist.destroy_process_group()
