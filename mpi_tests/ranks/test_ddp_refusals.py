"""What the hook cannot do is one clear error on every rank, and the job can go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvd_compress import Compression, MismatchError, ddp
from hvd_compress.compressors import MaskError
from hvd_compress.training import Masks

from .job import Job
from .replicated import adamw, everything, hooked, loss, mlp, tenth, train
from .training import assert_replicated

pytestmark = pytest.mark.usefixtures("torch_job")


def goes_on(job: Job) -> None:
    """The ranks can still train."""
    net = mlp()
    model, _ = hooked(net, tenth)
    train(job, model, adamw(net), range(2))
    assert_replicated(job, dict(net.named_parameters()))


def test_a_parameter_that_the_compression_does_not_know(several: Job) -> None:
    net = mlp()
    model = DistributedDataParallel(net)
    model.register_comm_hook(tenth([(n, p) for n, p in net.named_parameters() if n != "2.weight"]), ddp.hook)
    with pytest.raises(ValueError, match=r"\(64, 64\).*named_parameters"):
        loss(model, several.rank, 0).backward()
    goes_on(several)


def test_a_compression_without_parameters(job: Job) -> None:
    model = DistributedDataParallel(mlp())
    model.register_comm_hook(Compression.fp16, ddp.hook)
    with pytest.raises(ValueError, match=r"does not know its parameters.*named_parameters"):
        loss(model, job.rank, 0).backward()


def test_a_state_that_is_no_compression(job: Job) -> None:
    model = DistributedDataParallel(mlp())
    model.register_comm_hook(None, ddp.hook)
    with pytest.raises(ValueError, match="must come from hvd_compress.Compression: None"):
        loss(model, job.rank, 0).backward()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda named, odd: Compression.topk(named, density=0.2 if odd else 0.1), "density is 0.1 on rank 0 and 0.2"),
        (
            lambda named, odd: Compression.qsgd(named) if odd else Compression.topk(named),
            "compressor is topk on rank 0",
        ),
        (lambda named, odd: Compression.topk(named, seed=odd), "seed is"),
        (lambda named, odd: Compression.topk([(f"{odd}.{n}", p) for n, p in named]), "parameter 0 is"),
    ],
)
def test_ranks_that_made_it_differently(several: Job, make: Any, told: str) -> None:
    net, odd = mlp(), several.rank == several.size - 1
    model = DistributedDataParallel(net)
    model.register_comm_hook(make(list(net.named_parameters()), odd), ddp.hook)
    with pytest.raises(MismatchError, match=told):
        loss(model, several.rank, 0).backward()
    goes_on(several)


def test_a_layer_that_only_some_ranks_have_frozen_is_refused_by_ddp_itself(several: Job) -> None:
    net = mlp()
    net[2].requires_grad_(several.rank != several.size - 1)
    with pytest.raises(RuntimeError, match="same model across all ranks"):
        DistributedDataParallel(net)
    goes_on(several)


def test_a_layer_frozen_after_the_model_was_wrapped_is_told(several: Job) -> None:
    """DDP would take its gradient for zero on that rank, and train it on the others."""
    net = mlp()
    model, _ = hooked(net, tenth, find_unused_parameters=True)
    net[2].requires_grad_(several.rank != several.size - 1)
    with pytest.raises(MismatchError, match="frozen is"):
        loss(model, several.rank, 0).backward()
    goes_on(several)


def test_masks_that_differ(several: Job) -> None:
    net, masks = mlp(), Masks()
    model, _ = hooked(net, lambda named: Compression.masked(masks, named, min_numel=1))
    loss(model, several.rank, 0).backward()
    kept = torch.arange(64 * 64).view(64, 64) % (3 + (several.rank == 0)) == 0
    masks.update({"2.weight": kept})
    with pytest.raises(MaskError, match=r"2\.weight"):
        loss(model, several.rank, 1).backward()
    goes_on(several)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_momentum_in_both_dgc_and_the_optimizer_is_an_error_before_the_first_step(job: Job, optimizer: str) -> None:
    net = mlp()
    model, _ = hooked(net, lambda named: Compression.dgc(named, min_numel=1))
    made = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) if optimizer == "SGD" else adamw(net)
    loss(model, job.rank, 0).backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="momentum twice"):
        made.step()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before))


class Bare(nn.Module):
    """Parameters for losses that are made of them; the forward pass only has DDP wait for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.ones(50, 40) for _ in range(4))

    def forward(self) -> None:
        pass


def test_one_compression_for_two_models_at_once(several: Job) -> None:
    nets = nn.ModuleList([Bare(), Bare()])
    compression = tenth(nets.named_parameters())
    models = [DistributedDataParallel(net, bucket_cap_mb=1e-3) for net in nets]
    for model in models:
        model.register_comm_hook(compression, ddp.hook)
    for _ in range(2):  # one after the other is fine
        for model, net in zip(models, nets):
            model()
            sum(p.sum() for p in net.parameters()).backward()
    for model in models:
        model()
    with pytest.raises(RuntimeError, match="hooks of two models"):
        sum(p.sum() for parts in zip(*(net.parameters() for net in nets)) for p in parts).backward()


def test_a_rank_that_has_fewer_batches_is_named(several: Job) -> None:
    """Without Join, DDP itself would wait for half an hour."""
    job, net = several, mlp()
    model, compression = hooked(net, everything)
    last = job.rank == job.size - 1
    for step in range(2 if last else 3):
        if step == 2:
            with pytest.raises(RuntimeError, match=rf"rank {job.size - 1} has ended its training.*Join"):
                loss(model, job.rank, step).backward()
        else:
            loss(model, job.rank, step).backward()
    if last:
        compression.detach()  # as when the process ends
    job.barrier()
    goes_on(job)
