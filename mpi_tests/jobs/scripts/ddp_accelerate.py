"""Trains under Accelerate by DistributedDataParallel alone and by our hook; prints what came of it.

torchrun --standalone --nproc-per-node 2 mpi_tests/jobs/scripts/ddp_accelerate.py
"""

import accelerate
import torch
from torch.utils.data import DataLoader, TensorDataset

from hvd_compress import Compression, ddp

accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)


def train(make=None):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10))
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, inputs[:, :10].argmax(1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=16)
    model, optimizer, loader, schedule = accelerator.prepare(net, optimizer, DataLoader(data, batch_size=16), schedule)
    compression = make and make(net.named_parameters())
    if compression:
        model.register_comm_hook(compression, ddp.hook)
    for _ in range(2):
        for batch, wanted in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(batch), wanted)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    accelerator.free_memory()
    return torch.cat([p.detach().view(-1) for p in net.parameters()]), compression


alone, _ = train()
for name, make in {
    "topk of all": lambda named: Compression.topk(named, density=1.0, min_numel=1),
    "topk": lambda named: Compression.topk(named, density=0.05),
}.items():
    trained, compression = train(make)
    every = accelerator.gather(trained).view(accelerator.num_processes, -1)
    assert all(torch.equal(every[0], other) for other in every), f"{name}: the replicas differ"
    difference = float((trained - alone).abs().max())
    fewer = compression.telemetry.total.compression_ratio
    accelerator.print(f"{name}: {difference:.0e} from DDP alone, {fewer:.1f} times fewer bytes", flush=True)
accelerator.end_training()
