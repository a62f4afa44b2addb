"""What hvd_compress.mpi has besides what it shares with Horovod."""

import logging
import warnings

import pytest
import torch
from torch import nn

from hvd_compress import Compression
from hvd_compress.requests import ReduceOp

from .job import Job
from .training import (
    COMPRESSIONS,
    OPTIONS,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    copy,
    digest,
    gradients,
    grads,
    parameters,
    sgd,
)


@pytest.fixture
def mpi(plain_mpi: Job):
    from hvd_compress import mpi

    return mpi


@pytest.mark.parametrize("passes", [1, 2])
def test_backward_passes_past_those_announced_are_added_at_first_and_refused_under_way(
    job: Job, mpi, passes: int
) -> None:
    """In the first step nothing travels before step(); and at one rank, never."""
    of = parameters()
    make = COMPRESSIONS["topk"]
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()), backward_passes_per_step=passes)
    simulation = Simulation(job.size, make, of)

    def train(known: int) -> None:
        optimizer.zero_grad()
        for _ in range(known):
            backward(of, gradients(of, job.rank, known))
        optimizer.step()
        ranks = [{name: known * g for name, g in gradients(of, rank, known).items()} for rank in range(job.size)]
        assert_equal(grads(of), simulation.exchange(ranks))

    train(passes)
    if job.size > 1:
        for _ in range(passes):
            backward(of, gradients(of, job.rank, 0))
        with pytest.raises(RuntimeError, match=rf"backward_passes_per_step={passes}.*use_reentrant=False"):
            backward(of, gradients(of, job.rank, passes))
        with pytest.raises(RuntimeError, match=r"changed on rank.*synchronize\(\)"):
            optimizer.step()
    train(passes)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_first_step_of_more_passes_than_announced_trains_on(job: Job, mpi, passes: int) -> None:
    of = parameters()
    make = COMPRESSIONS["adacomp"]
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()), backward_passes_per_step=passes)
    simulation = Simulation(job.size, make, of)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(passes + 1):
            backward(of, gradients(of, job.rank, 10 * step + part))
        optimizer.step()
        of_ranks = [[gradients(of, rank, 10 * step + part) for part in range(passes + 1)] for rank in range(job.size)]
        sums = [{name: sum(part[name] for part in parts) for name in of} for parts in of_ranks]
        assert_equal(grads(of), simulation.exchange(sums))


WRONG = {
    "backward_passes_per_step": {"backward_passes_per_step": 0},
    "op must be": {"op": "average"},
    "compression must come": {"compression": object()},
}


def test_an_optimizer_is_distributed_once(job: Job, mpi) -> None:
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()))
    with pytest.raises(ValueError, match="SGD is distributed already"):
        mpi.DistributedOptimizer(optimizer, of.items())


@pytest.mark.parametrize("told", WRONG)
def test_wrong_arguments_are_value_errors(mpi, told: str) -> None:
    of = parameters()
    with pytest.raises(ValueError, match=told):
        mpi.DistributedOptimizer(sgd(of), of.items(), **WRONG[told])


def test_the_optimizer_keeps_its_class_groups_and_state(job: Job, mpi) -> None:
    of = parameters()
    groups = [{"params": [of["a"]], "lr": 0.5}, {"params": [of["b"], of["c"]]}]
    inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    optimizer = job.distribute(inner, of.items(), COMPRESSIONS["topk"](of.items()))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups is inner.param_groups
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    before = copy(of)
    backward(of, gradients(of, job.rank, 0))
    optimizer.step()
    assert_close(copy(of), {name: before[name] - (0.5 if name == "a" else 0.1) * of[name].grad for name in of})
    assert inner.state_dict()["state"].keys() == {0, 1, 2}
    state = optimizer.state_dict()
    assert state["state"].keys() == {0, 1, 2}
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("first", ["scheduler", "wrapper"])
def test_schedulers_work(job: Job, mpi, first: str) -> None:
    of = parameters()
    inner = sgd(of, lr=1.0)
    optimizer = job.distribute(inner, of.items(), COMPRESSIONS["topk"](of.items())) if first == "wrapper" else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer or inner, step_size=2, gamma=0.5)
        optimizer = optimizer or job.distribute(inner, of.items(), COMPRESSIONS["topk"](of.items()))
        for step, rate in enumerate([1.0, 1.0, 0.5, 0.5, 0.25]):
            before = copy(of)
            optimizer.zero_grad()
            backward(of, gradients(of, job.rank, step))
            optimizer.step()
            assert_equal(copy(of), {name: before[name] - rate * of[name].grad for name in of})
            scheduler.step()
    assert_replicated(job, of)


def test_a_closure_is_evaluated_before_the_exchange(job: Job, mpi) -> None:
    of = parameters()
    make = COMPRESSIONS["adacomp"]
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()))
    simulation = Simulation(job.size, make, of)
    for step in range(3):

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            backward(of, gradients(of, job.rank, step))
            return 7.0 + step

        assert optimizer.step(closure) == 7.0 + step
        assert_equal(grads(of), simulation.exchange([gradients(of, rank, step) for rank in range(job.size)]))


def test_a_parameter_group_added_later_takes_part(job: Job, mpi) -> None:
    of = parameters()
    optimizer = job.distribute(torch.optim.SGD([of["a"]], lr=0.1), of.items(), Compression.topk(of.items(), **OPTIONS))
    simulation = Simulation(job.size, lambda named: Compression.topk(named, **OPTIONS), of)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [of["b"], of["c"]]})
        names = ["a"] if step < 2 else list(of)
        optimizer.zero_grad()
        backward(of, {name: gradients(of, job.rank, step)[name] for name in names})
        optimizer.step()
        known = [gradients(of, rank, step) for rank in range(job.size)]
        assert_equal(grads(of), simulation.exchange([{name: mine[name] for name in names} for mine in known]))


def state(rank: int) -> dict[str, torch.Tensor]:
    """Whatever a state_dict may hold, other on every rank."""
    generator = torch.Generator().manual_seed(rank)
    wide = torch.randn(20, 30, generator=generator)
    return {
        "float": wide.clone(),
        "transposed": wide.t(),
        "strided": wide[::2, ::3],
        "bfloat16": wide.to(torch.bfloat16),
        "half": wide.half(),
        "double": wide.double(),
        "int": torch.tensor(rank),  # such as num_batches_tracked
        "ints": torch.arange(rank, rank + 5),
        "bools": wide > 0,
        "empty": torch.empty(0, 3),
    }


@pytest.fixture(params=[None, 16])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages as a whole, and cut into small pieces."""
    if request.param:
        monkeypatch.setattr("hvd_compress.transports.mpi.CHUNK_BYTES", request.param)
        monkeypatch.setattr("hvd_compress.mpi.CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunk_bytes")
def test_broadcast_parameters_gives_all_those_of_the_root(job: Job, mpi) -> None:
    for root in range(job.size):
        mine = state(job.rank)
        mpi.broadcast_parameters(mine, root_rank=root)
        assert_equal(mine, state(root))


def test_broadcast_parameters_takes_named_parameters(job: Job, mpi) -> None:
    torch.manual_seed(job.rank)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    mpi.broadcast_parameters(model.named_parameters())
    assert_replicated(job, dict(model.named_parameters()))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", ["shape", "dtype", "name", "missing"])
def test_broadcast_parameters_refuses_other_models_on_every_rank(several: Job, mpi, how: str) -> None:
    mine = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    if several.rank == several.size - 1:
        mine = {
            "shape": {"a": torch.zeros(4, 3), "b": mine["b"]},
            "dtype": {"a": mine["a"].double(), "b": mine["b"]},
            "name": {"a": mine["a"], "c": mine["b"]},
            "missing": {"a": mine["a"]},
        }[how]
    with pytest.raises(ValueError, match=f"rank {several.size - 1} has.*same model"):
        mpi.broadcast_parameters(mine)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_broadcast_optimizer_state_gives_all_that_of_the_root(job: Job, mpi, cls: type) -> None:
    of = parameters({"a": (5, 4)})
    optimizer = cls(of.values(), lr=0.1 * (job.rank + 1), **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
    for step in range(1 + job.rank if job.rank else 2):  # rank 0 has a state; others may have another
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
    mpi.broadcast_optimizer_state(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    held = {name: torch.as_tensor(value) for name, value in optimizer.state_dict()["state"][0].items()}
    assert len(set(job.allgather(digest(held)))) == 1


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_messages_may_be_cut_into_small_pieces(job: Job, mpi, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("hvd_compress.transports.mpi.CHUNK_BYTES", 64)
    of = parameters({"a": (30, 20), "flat": (7,)})
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS[kind](of.items()))
    simulation = Simulation(job.size, COMPRESSIONS[kind], of)
    for step in range(2):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        expected = simulation.exchange([gradients(of, rank, step) for rank in range(job.size)])
        assert_close(grads(of), expected, 1e-2 if kind == "fp16" else 1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_transports_cut_messages(job: Job, mpi, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    from hvd_compress.requests import ReduceOp

    monkeypatch.setattr("hvd_compress.transports.mpi.CHUNK_BYTES", chunk)
    transport = job.transport()
    lengths = [17 * rank for rank in range(job.size)]
    parts = [torch.full((lengths[job.rank],), job.rank, dtype=torch.uint8)]
    assert [buffer.tolist() for buffer in transport.allgather("", parts).wait()] == [
        [rank] * length for rank, length in enumerate(lengths)
    ]
    outgoing = [[torch.full((5 * job.rank + to,), job.rank, dtype=torch.uint8)] for to in range(job.size)]
    assert [buffer.tolist() for buffer in transport.alltoall("", outgoing).wait()] == [
        [sender] * (5 * sender + job.rank) for sender in range(job.size)
    ]
    reduced = transport.allreduce("", torch.arange(50.0) + job.rank, ReduceOp.MAX).wait()
    assert torch.equal(reduced, torch.arange(50.0) + job.size - 1)
    assert torch.equal(
        transport.broadcast("", torch.arange(50) * job.rank, job.size - 1).wait(), torch.arange(50) * (job.size - 1)
    )


def test_without_thread_multiple_it_says_so_once(several: Job, mpi, caplog: pytest.LogCaptureFixture) -> None:
    from mpi4py import MPI

    of = parameters()
    with caplog.at_level(logging.WARNING, "hvd_compress"):
        several.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()))
    said = [record for record in caplog.records if "MPI_THREAD_MULTIPLE" in record.getMessage()]
    expected = several.rank == 0 and MPI.Query_thread() < MPI.THREAD_MULTIPLE
    assert len(said) == expected


def test_an_optimizer_that_is_dropped_ends_its_thread(several: Job, mpi) -> None:
    import gc
    import threading

    def threads() -> int:
        return sum(thread.name == "hvd_compress" for thread in threading.enumerate())

    gc.collect()
    before = threads()
    of = parameters()
    optimizer = several.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()))
    backward(of, gradients(of, several.rank, 0))
    optimizer.step()
    del optimizer
    gc.collect()
    assert threads() == before


def test_there_may_be_many_transports_that_add_float16(plain_mpi: Job) -> None:
    """mpi4py has room for some twenty functions of ours."""
    transports = [plain_mpi.transport() for _ in range(30)]
    for transport in transports:
        total = transport.allreduce("half", torch.ones(3, dtype=torch.float16), ReduceOp.SUM).wait()
        assert total.tolist() == [plain_mpi.size] * 3
    for transport in transports:
        transport.leave()
