"""The hook of DistributedDataParallel: what gradients become, in all ways that DDP and its user can ask for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.checkpoint import checkpoint

from hvd_compress import Compression, ddp

from .job import Job
from .replicated import (
    adamw,
    combined,
    everything,
    hooked,
    local_gradients,
    loss,
    mlp,
    tenth,
    train,
)
from .training import Simulation, assert_close, assert_equal, assert_replicated, copy, residuals

pytestmark = pytest.mark.usefixtures("torch_job")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one bucket": {"bucket_cap_mb": 25},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "no buffers": {"broadcast_buffers": False},
}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_entries_of_topk_train_as_ddp_alone(job: Job, options: dict[str, Any], micro_batches: int) -> None:
    if "static_graph" in options and micro_batches > 1:
        pytest.skip("DDP itself has no no_sync() in the first step of a static graph")
    trained = []
    for make in (None, everything):
        net = mlp()
        model, _ = hooked(net, make, **options)
        train(job, model, adamw(net), range(12), micro_batches=micro_batches)
        trained.append(copy(dict(net.named_parameters())))
        assert_replicated(job, trained[-1])
    assert_close(*trained, tolerance=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_those_of_the_simulation_while_buckets_change(job: Job, options: dict[str, Any]) -> None:
    """DDP rebuilds its buckets after the first step; residuals are of parameters."""
    net = mlp()
    model, compression = hooked(net, tenth, **options)
    optimizer, simulation = adamw(net), Simulation(job.size, tenth, dict(net.named_parameters()))
    for step in range(5):
        known = [local_gradients(net, rank, step) for rank in range(job.size)]
        optimizer.zero_grad()
        loss(model, job.rank, step).backward()
        expected = simulation.exchange(known)
        weights = [name for name in expected if name.endswith("weight")]  # what is not compressed Gloo adds up
        assert_equal({n: combined(net)[n] for n in weights}, {n: expected[n] for n in weights})
        assert_close(combined(net), expected)
        optimizer.step()
    if job.size > 1:
        assert_equal(residuals(compression), simulation.residuals(job.rank))


@pytest.mark.parametrize("whose", ["net", "model"])
def test_names_may_be_those_of_the_net_or_of_the_model(several: Job, whose: str) -> None:
    net = mlp()
    model = nn.parallel.DistributedDataParallel(net)
    compression = tenth({"net": net, "model": model}[whose].named_parameters())
    model.register_comm_hook(compression, ddp.hook)
    train(several, model, adamw(net), range(2))
    prefix = "module." if whose == "model" else ""
    assert residuals(compression).keys() == {f"{prefix}{number}.weight" for number in (0, 2, 4)}


def test_no_sync_exchanges_the_sum_of_the_passes(several: Job) -> None:
    job, net = several, mlp()
    model, _ = hooked(net, tenth)
    simulation = Simulation(job.size, tenth, dict(net.named_parameters()))
    for step in range(3):
        net.zero_grad()
        with model.no_sync():
            for part in range(2):
                loss(model, job.rank, 3 * step + part).backward()
        loss(model, job.rank, 3 * step + 2).backward()
        parts = [[local_gradients(net, rank, 3 * step + part) for part in range(3)] for rank in range(job.size)]
        expected = simulation.exchange([{n: a[n] + b[n] + c[n] for n in a} for a, b, c in parts])
        assert_close(combined(net), expected)


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_passes_that_add_up_without_no_sync_lose_nothing(several: Job, with_optimizer: bool) -> None:
    """What stands in `grad` is handed in again, so what was sent of it, and what was not, must count the first time."""
    job, net = several, mlp()
    model, compression = hooked(net, tenth)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for number in range(4):
        if with_optimizer and number == 1:
            optimizer.step()  # at rate 0; from now on it is known that there is one
        loss(model, job.rank, number).backward()
        for rank in range(job.size):
            for name, gradient in local_gradients(net, rank, number).items():
                total[name] += gradient / job.size
    held = job.allgather(residuals(compression))
    for name, p in net.named_parameters():
        owed = sum(mine[name].view(p.shape) for mine in held) / job.size if name in held[0] else 0
        torch.testing.assert_close(p.grad + owed, total[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_thrown_away_leave_residuals_as_they_were(several: Job, to_none: bool) -> None:
    job, net = several, mlp()
    model, compression = hooked(net, tenth)
    optimizer = adamw(net)
    train(job, model, optimizer, range(3))
    before = copy(residuals(compression))
    simulation = Simulation(job.size, tenth, dict(net.named_parameters()))
    simulation.load(job.allgather(before))
    optimizer.zero_grad(set_to_none=to_none)
    loss(model, job.rank, 3).backward()
    optimizer.zero_grad(set_to_none=to_none)
    loss(model, job.rank, 4).backward()
    assert_close(combined(net), simulation.exchange([local_gradients(net, r, 4) for r in range(job.size)]))


def test_clipping_after_backward_clips_the_mean(several: Job) -> None:
    job, net = several, mlp()
    model, _ = hooked(net, everything)
    loss(model, job.rank, 0).backward()
    mean = {n: sum(local_gradients(net, r, 0)[n] for r in range(job.size)) / job.size for n in combined(net)}
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    assert float(norm) == pytest.approx(float(torch.cat([g.view(-1) for g in mean.values()]).norm()), rel=1e-4)
    assert_replicated(job, combined(net))


class Branches(nn.Module):
    """Of which an input takes one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(40, 30)
        self.branches = nn.ModuleList(nn.Linear(30, 3) for _ in range(3))

    def forward(self, inputs: torch.Tensor, branch: int) -> torch.Tensor:
        return self.branches[branch](self.stem(inputs).tanh())


def test_branches_that_only_some_ranks_take_or_none(job: Job) -> None:
    trained = []
    for make in (None, everything):
        net = Branches()
        model, _ = hooked(net, make, find_unused_parameters=True)
        optimizer = adamw(net)
        for step in range(6):
            optimizer.zero_grad()
            inputs = torch.randn(8, 40, generator=torch.Generator().manual_seed(100 * job.rank + step))
            model(inputs, (job.rank + step) % 2).square().mean().backward()
            optimizer.step()
        assert net.branches[2].weight.grad is None, "no rank has used it"
        trained.append(copy(dict(net.named_parameters())))
        assert_replicated(job, trained[-1])
    assert_close(*trained, tolerance=1e-6)


def test_channels_last_changes_nothing(job: Job) -> None:
    """The bucket holds such a gradient in the order of its memory; the compression sees it in that of its shape."""
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3)).to(memory_format=memory_format)
        model, _ = hooked(net, lambda named: Compression.powersgd(named, approximation_rank=1, min_numel=1))
        for step in range(3):
            net.zero_grad()
            images = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(10 * job.rank + step))
            model(images.contiguous(memory_format=memory_format)).square().mean().backward()
        assert net[0].weight.grad.is_contiguous(memory_format=memory_format)
        assert_replicated(job, combined(net))
        found.append(combined(net))
    assert_close(*found, tolerance=1e-4)


@pytest.mark.parametrize("make", [everything, Compression.none, Compression.terngrad])
def test_sparse_gradients_pass_beside_compressed_ones(job: Job, make: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(50, 40, sparse=True), nn.Linear(40, 30, bias=False))
    model, _ = hooked(net, make)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        words = [
            torch.randint(0, 50, (3 + rank,), generator=torch.Generator().manual_seed(10 * step + rank))
            for rank in range(job.size)
        ]
        optimizer.zero_grad()
        model(words[job.rank]).sum().backward()
        gradient = net[0].weight.grad
        assert gradient.is_sparse
        row = net[1].weight.detach().sum(0)
        expected = torch.zeros(50, 40)
        for of_rank in words:
            expected.index_add_(0, of_rank, row.expand(len(of_rank), 40) / job.size)
        torch.testing.assert_close(gradient.to_dense(), expected)
        optimizer.step()
    assert_replicated(job, dict(net.named_parameters()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(job: Job, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            inputs = self.net[1](self.net[0](inputs))
            return self.net[4](checkpoint(self.net[2:4], inputs, use_reentrant=reentrant))

    trained = []
    for make in (None, everything):
        net = Checkpointed()
        model, _ = hooked(net, make, static_graph=reentrant)
        train(job, model, adamw(net), range(4))
        trained.append(copy(dict(net.named_parameters())))
        assert_replicated(job, trained[-1])
    assert_close(*trained, tolerance=1e-6)


@pytest.mark.parametrize("kind", ["topk", "qsgd", "powersgd", "adacomp"])
def test_a_hook_around_ours_sees_the_mean(several: Job, kind: str) -> None:
    job = several
    seen = []

    def doubled(state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return ddp.hook(state, bucket).then(lambda future: seen.append(bucket.index()) or future.value()[...].mul_(2))

    doubled.__annotations__.clear()
    found = []
    for hook in (ddp.hook, doubled):
        net = mlp()
        model = nn.parallel.DistributedDataParallel(net)
        model.register_comm_hook(getattr(Compression, kind)(net.named_parameters(), min_numel=1), hook)
        loss(model, job.rank, 0).backward()
        found.append(combined(net))
    assert seen == [0]
    assert_equal({name: 2 * gradient for name, gradient in found[0].items()}, found[1])


def test_inside_ddps_own_fp16_wrapper(several: Job) -> None:
    job, net = several, mlp()
    model = nn.parallel.DistributedDataParallel(net)
    compression = everything(net.named_parameters())
    model.register_comm_hook(compression, default_hooks.fp16_compress_wrapper(ddp.hook))
    loss(model, job.rank, 0).backward()
    mean = {n: sum(local_gradients(net, r, 0)[n] for r in range(job.size)) / job.size for n in combined(net)}
    for name, gradient in combined(net).items():
        torch.testing.assert_close(gradient, mean[name], rtol=2e-3, atol=1e-4)
    assert_replicated(job, combined(net))


def test_a_model_may_be_wrapped_anew_with_the_same_compression(several: Job) -> None:
    """As for fine-tuning, with some layers frozen: residuals stay."""
    job, net = several, mlp()
    model, compression = hooked(net, tenth)
    train(job, model, adamw(net), range(2))
    before = copy(residuals(compression))
    net[0].requires_grad_(False)
    model = nn.parallel.DistributedDataParallel(net)
    model.register_comm_hook(compression, ddp.hook)
    frozen = copy(dict(net[0].named_parameters()))
    train(job, model, adamw(net), range(2, 4))
    assert_equal(copy(dict(net[0].named_parameters())), frozen)
    assert torch.equal(residuals(compression)["0.weight"], before["0.weight"])
    assert not torch.equal(residuals(compression)["2.weight"], before["2.weight"])
    assert_replicated(job, dict(net.named_parameters()))
