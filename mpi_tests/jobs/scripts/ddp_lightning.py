"""Trains under Lightning by DistributedDataParallel alone and by our hook; prints what came of it.

torchrun --standalone --nproc-per-node 2 mpi_tests/jobs/scripts/ddp_lightning.py
"""

import os
import warnings

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hvd_compress import Compression, ddp

warnings.filterwarnings("ignore", category=UserWarning)  # of Lightning: workers of loaders, and the like


class Digits(lightning.LightningModule):
    """A small network, and data that it can learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10))

    def training_step(self, batch, number):
        inputs, wanted = batch
        loss = torch.nn.functional.cross_entropy(self.net(inputs), wanted)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(inputs, inputs[:, :10].argmax(1))
        return DataLoader(data, batch_size=16, sampler=DistributedSampler(data))


class Compress(Callback):
    """Lightning gives a hook to DDP on GPUs alone; this does everywhere."""

    def __init__(self, make):
        self.make = make

    def on_train_start(self, trainer, module):
        self.compression = self.make(module.named_parameters())
        trainer.strategy.model.register_comm_hook(self.compression, ddp.hook)


def train(*callbacks):
    module = Digits()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return torch.cat([p.detach().view(-1) for p in module.parameters()])


alone = train()
for name, make in {
    "topk of all": lambda named: Compression.topk(named, density=1.0, min_numel=1),
    "topk": lambda named: Compression.topk(named, density=0.05),
}.items():
    callback = Compress(make)
    trained = train(callback)
    every = [torch.empty_like(trained) for _ in range(dist.get_world_size())]
    dist.all_gather(every, trained)
    assert all(torch.equal(every[0], other) for other in every), f"{name}: the replicas differ"
    traffic = callback.compression.telemetry.total
    difference = float((trained - alone).abs().max())
    if dist.get_rank() == 0:
        print(f"{name}: {difference:.0e} from DDP alone, {traffic.compression_ratio:.1f} times fewer bytes", flush=True)
dist.destroy_process_group()
