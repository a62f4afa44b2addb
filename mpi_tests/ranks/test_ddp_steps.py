"""What the hook makes of steps: GradScaler unchanged, optimizers of all kinds, uneven inputs, saved states."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer

from hvd_compress import Compression, ddp

from .job import Job
from .replicated import adamw, combined, everything, hooked, local_gradients, loss, mlp, tenth, train
from .training import Simulation, assert_close, assert_equal, assert_replicated, copy, residuals

pytestmark = pytest.mark.usefixtures("torch_job")


def scaled_step(
    job: Job, model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, step: int, *, bad: float = 0.0
) -> None:
    """The recipe that every tutorial has, with clipping; `bad` goes into the last rank's loss."""
    optimizer.zero_grad()
    value = loss(model, job.rank, step)
    if bad and job.rank == job.size - 1:
        value = value * bad
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", ["topk", "adacomp", "powersgd", "scalecom", "dgc"])
def test_grad_scaler_unchanged_skips_the_step_on_every_rank(several: Job, kind: str, bad: float) -> None:
    job, net = several, mlp()
    model, compression = hooked(net, lambda named: getattr(Compression, kind)(named, min_numel=1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        before, state, scale = copy(dict(net.named_parameters())), copy(residuals(compression)), scaler.get_scale()
        scaled_step(job, model, optimizer, scaler, step, bad=bad if step == 2 else 0.0)
        assert scaler.get_scale() == (scale / 2 if step == 2 else scale)
        if step == 2:
            assert_equal(copy(dict(net.named_parameters())), before)
            assert_equal(copy(residuals(compression)), state)
        assert all(torch.isfinite(p).all() for p in net.parameters())
        assert_replicated(job, dict(net.named_parameters()))


@pytest.mark.parametrize("kind", ["topk", "adacomp", "powersgd", "dgc", "qsgd"])
def test_training_does_not_depend_on_the_loss_scale(several: Job, kind: str) -> None:
    """Scales are powers of two, which change no bit; the compression learns of them from the scaler's own step."""
    job, trained = several, []
    for init in (1.0, 4096.0):
        net = mlp()
        model, compression = hooked(net, lambda named: getattr(Compression, kind)(named, min_numel=1, exclude="*.bias"))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=init, growth_interval=1 if init > 1 else 1000)
        for step in range(6):
            scaled_step(job, model, optimizer, scaler, step)
        assert compression.loss_scale == (1.0 if init == 1 else init * 32), "that of the last backward pass"
        trained.append(copy(dict(net.named_parameters())))
    # More than two ranks' sums of Gloo and of frames differ in their order alone; here they are the same ranks.
    assert_close(*trained, tolerance=1e-5)


def test_a_zero_redundancy_optimizer_trains_as_the_plain_one(job: Job) -> None:
    trained = []
    for sharded in (False, True):
        net = mlp()
        model, _ = hooked(net, tenth)
        zero = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-3)
        optimizer = zero if sharded else adamw(net)
        train(job, model, optimizer, range(5))
        trained.append(copy(dict(net.named_parameters())))
        assert_replicated(job, trained[-1])
    assert_equal(*trained)


def uneven(job: Job, make: Any) -> tuple[nn.Module, Any]:
    """Each rank has two batches more than the one before it."""
    net = mlp()
    model, compression = hooked(net, make)
    optimizer = adamw(net)
    with Join([model]):
        for step in range(3 + 2 * job.rank):
            optimizer.zero_grad()
            loss(model, job.rank, step).backward()
            optimizer.step()
    return net, compression


def test_uneven_inputs_by_join(job: Job) -> None:
    alone, _ = uneven(job, None)
    ours, _ = uneven(job, everything)
    assert_close(dict(alone.named_parameters()), dict(ours.named_parameters()), tolerance=1e-6)
    assert_replicated(job, dict(ours.named_parameters()))


def test_a_rank_that_has_joined_sends_what_it_owes(several: Job) -> None:
    net, compression = uneven(several, tenth)
    assert_replicated(several, dict(net.named_parameters()))
    if several.rank == 0:  # each of its zero gradients sends a tenth of what is left; what is sent is zero afterwards
        owed = residuals(compression)["2.weight"]
        assert int((owed == 0).sum()) >= 0.1 * owed.numel() * 2 * (several.size - 1)


def test_two_models_in_one_process(job: Job) -> None:
    """Each with a compression of its own; as of a generator and its discriminator, one pass reaches both."""
    nets = [mlp(), mlp()]
    models = [hooked(net, tenth)[0] for net in nets]
    simulations = [Simulation(job.size, tenth, dict(net.named_parameters())) for net in nets]
    for step in range(4):
        for net in nets:
            net.zero_grad()
        sum(loss(model, job.rank, 10 * number + step) for number, model in enumerate(models)).backward()
        for number, (net, simulation) in enumerate(zip(nets, simulations)):
            known = [local_gradients(net, rank, 10 * number + step) for rank in range(job.size)]
            assert_close(combined(net), simulation.exchange(known))


def test_models_on_sets_of_ranks(several: Job) -> None:
    job = several
    ranks = [list(range(0, job.size, 2)), list(range(1, job.size, 2))]
    group = job.split(ranks).of_optimizer["process_group"]
    mine, net = ranks[job.rank % 2], mlp()
    model = nn.parallel.DistributedDataParallel(net, process_group=group)
    compression = tenth(net.named_parameters())
    ddp.attach(compression, process_group=group)
    model.register_comm_hook(compression, ddp.hook)
    simulation = Simulation(len(mine), tenth, dict(net.named_parameters()))
    for step in range(2 + job.rank % 2):  # one set makes a step more
        net.zero_grad()
        loss(model, job.rank, step).backward()
        assert_close(combined(net), simulation.exchange([local_gradients(net, rank, step) for rank in mine]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(job: Job, backend: str) -> None:
    trained = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = mlp()
        model, _ = hooked(net, tenth, bucket_cap_mb=25)  # torch.compile refuses smaller ones than DDP's first
        called = torch.compile(model, backend=backend) if compiled else model
        optimizer = adamw(net)
        for step in range(4):
            optimizer.zero_grad()
            loss(called, job.rank, step).backward()
            optimizer.step()
        trained.append(copy(dict(net.named_parameters())))
        assert_replicated(job, trained[-1])
    assert_close(*trained, tolerance=1e-6)


def test_batch_norm_statistics_stay_those_of_ddp(job: Job) -> None:
    trained = []
    for make in (None, everything):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(40, 30, bias=False), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3))
        model, _ = hooked(net, make)
        train(job, model, adamw(net), range(5))
        trained.append(copy(net.state_dict()))
        loss(model, job.rank, 9)  # whose forward pass broadcasts the buffers
        assert_replicated(job, dict(net.named_parameters()))
    assert_close(*trained, tolerance=1e-5)


def save(job: Job, directory: str, net: nn.Module, optimizer: Any, compression: Any) -> None:
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "compression": ddp.Checkpoint(compression)}
    dcp.save(state, checkpoint_id=directory)


def load(directory: str, net: nn.Module, optimizer: Any, compression: Any) -> None:
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "compression": ddp.Checkpoint(compression)}
    dcp.load(state, checkpoint_id=directory)
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


@pytest.fixture
def directory(job: Job) -> Any:
    made = tempfile.mkdtemp(prefix="hvd_compress_dcp.") if job.rank == 0 else ""
    path = job.allgather(made)[0]
    yield path
    job.barrier()
    if job.rank == 0:
        for file in Path(path).glob("*"):
            file.unlink()
        Path(path).rmdir()


@pytest.mark.parametrize("kind", ["topk", "powersgd", "dgc"])
def test_a_distributed_checkpoint_resumes_to_the_bit(job: Job, kind: str, directory: str) -> None:
    def make(named: Any) -> Any:
        return getattr(Compression, kind)(named, min_numel=1)

    def optimizer_of(net: nn.Module) -> Any:
        return torch.optim.SGD(net.parameters(), lr=0.1)

    net = mlp()
    model, compression = hooked(net, make)
    optimizer = optimizer_of(net)
    train(job, model, optimizer, range(3))
    save(job, directory, net, optimizer, compression)
    train(job, model, optimizer, range(3, 6))
    other = mlp()
    model, resumed = hooked(other, make)
    optimizer = optimizer_of(other)
    load(directory, other, optimizer, resumed)
    train(job, model, optimizer, range(3, 6))
    assert_equal(residuals(resumed), residuals(compression))
    assert_equal(dict(other.named_parameters()), dict(net.named_parameters()))


def test_a_distributed_checkpoint_of_fewer_ranks_keeps_the_sum_of_residuals(several: Job, directory: str) -> None:
    job, net = several, mlp()
    group = job.split([[0], list(range(1, job.size))]).of_optimizer["process_group"]
    first = job.rank == 0
    model = nn.parallel.DistributedDataParallel(net, process_group=group)
    compression = Compression.dgc(net.named_parameters(), min_numel=1)  # which takes part alone, too
    ddp.attach(compression, group)
    model.register_comm_hook(compression, ddp.hook)
    if first:
        train(job, model, torch.optim.SGD(net.parameters(), lr=0.1), range(3))
        dcp.save({"compression": ddp.Checkpoint(compression)}, checkpoint_id=directory, no_dist=True)
        owed = copy(residuals(compression))
    job.barrier()
    model, taken = hooked(net, lambda named: Compression.dgc(named, min_numel=1))
    dcp.load({"compression": ddp.Checkpoint(taken, saved_by=1)}, checkpoint_id=directory)
    ddp.attach(taken)
    everyone = job.allgather(residuals(taken))
    if first:
        assert owed.keys() == everyone[0].keys()
        total = {name: sum(mine[name] for mine in everyone) for name in owed}
        for name in owed.keys() & dict(net.named_parameters()).keys():
            torch.testing.assert_close(total[name].view(-1), owed[name].view(-1))
