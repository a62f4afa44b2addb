"""Models in DistributedDataParallel with our hook, and batches that every rank knows of all others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvd_compress import Compression, GradientCompression, ddp

from .job import Job, NamedParameters

MANY_BUCKETS = {"bucket_cap_mb": 0.01}
MakeCompression = Callable[[NamedParameters], GradientCompression]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))


def everything(named: NamedParameters) -> GradientCompression:
    return Compression.topk(named, density=1.0, min_numel=1)


def tenth(named: NamedParameters) -> GradientCompression:
    return Compression.topk(named, density=0.1, min_numel=1)


def hooked(
    net: nn.Module, make: MakeCompression | None, **options: Any
) -> tuple[DistributedDataParallel, GradientCompression | None]:
    """The model, wrapped; with `make`, by our hook."""
    model = DistributedDataParallel(net, **{**MANY_BUCKETS, **options})
    if make is None:
        return model, None
    compression = make(list(net.named_parameters()))
    model.register_comm_hook(compression, ddp.hook)
    return model, compression


def batch(rank: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randn(8, 40, generator=generator), torch.randn(8, 3, generator=generator)


def loss(model: nn.Module, rank: int, number: int) -> Tensor:
    inputs, targets = batch(rank, number)
    return nn.functional.mse_loss(model(inputs), targets)


def train(
    job: Job,
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    micro_batches: int = 1,
) -> None:
    """Steps of so many backward passes each, all but the last of them in no_sync()."""
    for step in steps:
        optimizer.zero_grad()
        for part in range(micro_batches):
            with contextlib.nullcontext() if part == micro_batches - 1 else model.no_sync():
                loss(model, job.rank, micro_batches * step + part).backward()
        optimizer.step()


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    """At its usual rate: it makes a step of that size of any gradient, be it nothing but rounding."""
    return torch.optim.AdamW(net.parameters(), lr=1e-3)


def local_gradients(net: nn.Module, rank: int, number: int) -> dict[str, Tensor]:
    """What a rank's batch gives, without DDP."""
    named = dict(net.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss(net, rank, number), list(named.values()))))


def combined(net: nn.Module) -> dict[str, Tensor]:
    """What stands in `grad` now."""
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
