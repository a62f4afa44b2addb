"""What a user does with the distributed optimizer: clipping, accumulation, sums, groups, process sets."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_compress import Compression, GradientCompression

from .job import Job, NamedParameters
from .training import (
    COMPRESSIONS,
    IN_FRAMES,
    OPTIONS,
    Gradients,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    copy,
    gradients,
    grads,
    parameters,
    sgd,
)


def exchanged(simulation: Simulation, of: dict[str, Tensor], step: int, *, average: bool = True) -> Gradients:
    """What the gradients of a step become."""
    return simulation.exchange([gradients(of, rank, step) for rank in range(simulation.size)], average=average)


def run(job: Job, kind: str, steps: int = 2, **options: Any) -> None:
    """Steps whose gradients must be those of the simulation."""
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS[kind](of.items()), **options)
    simulation = Simulation(job.size, COMPRESSIONS[kind], of)
    for step in range(steps):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        expected = exchanged(simulation, of, step, average=options.get("op") != "sum")
        if kind in IN_FRAMES:
            assert_equal(grads(of), expected)
        else:
            assert_close(grads(of), expected, 1e-2 if kind == "fp16" else 1e-6)


@pytest.mark.parametrize("op", ["average", "sum"])
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_average_and_sum_are_those_of_the_simulation(job: Job, kind: str, op: str) -> None:
    run(job, kind, op=op)


@pytest.mark.parametrize("kind", ["none", "topk", "terngrad"])
def test_predivide_factor_changes_nothing_but_rounding(job: Job, kind: str) -> None:
    run(job, kind, gradient_predivide_factor=3.0)


@pytest.mark.parametrize("kind", ["none", "bf16", "topk", "terngrad"])
def test_number_of_groups_changes_nothing(job: Job, kind: str) -> None:
    run(job, kind, groups=2)


def test_groups_of_parameters_change_nothing(job: Job) -> None:
    of = parameters()
    make = COMPRESSIONS["adacomp"]
    groups = [[of["a"], of["c"]]]  # b is on its own
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()), groups=groups)
    simulation = Simulation(job.size, make, of)
    for step in range(3):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        assert_equal(grads(of), exchanged(simulation, of, step))


@pytest.mark.parametrize("kind", IN_FRAMES)
def test_clipping_between_synchronize_and_step_sees_combined_gradients(job: Job, kind: str) -> None:
    of = parameters()
    optimizer = job.distribute(sgd(of, lr=1.0), of.items(), COMPRESSIONS[kind](of.items()))
    simulation = Simulation(job.size, COMPRESSIONS[kind], of)
    for step in range(3):
        before = copy(of)
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.synchronize()
        assert_equal(grads(of), exchanged(simulation, of, step))
        torch.nn.utils.clip_grad_norm_(of.values(), 0.5)
        clipped = grads(of)
        assert torch.cat([g.view(-1) for g in clipped.values()]).norm() == pytest.approx(0.5, rel=1e-3)
        with warnings.catch_warnings(), optimizer.skip_synchronize():
            warnings.simplefilter("error")
            optimizer.step()
        assert_equal(grads(of), clipped)
        assert_equal(copy(of), {name: before[name] - clipped[name] for name in of})
    assert_replicated(job, of)


@pytest.mark.usefixtures("optimizers")
def test_step_after_synchronize_warns_without_skip_synchronize(job: Job) -> None:
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), Compression.none(of.items()))
    backward(of, gradients(of, job.rank, 0))
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="skip_synchronize"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["none", *IN_FRAMES])
def test_backward_passes_accumulate_before_one_exchange(job: Job, kind: str) -> None:
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS[kind](of.items()), backward_passes_per_step=2)
    simulation = Simulation(job.size, COMPRESSIONS[kind], of)
    for step in range(3):
        optimizer.zero_grad()
        for part in (2 * step, 2 * step + 1):
            backward(of, gradients(of, job.rank, part))
        optimizer.step()
        parts = [[gradients(of, rank, part) for part in (2 * step, 2 * step + 1)] for rank in range(job.size)]
        expected = simulation.exchange([{name: one[name] + two[name] for name in of} for one, two in parts])
        if kind == "none":
            assert_close(grads(of), expected)
        else:
            assert_equal(grads(of), expected)


def test_fewer_backward_passes_than_announced_are_exchanged_at_the_step(job: Job) -> None:
    of = parameters()
    make = COMPRESSIONS["topk"]
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()), backward_passes_per_step=3)
    simulation = Simulation(job.size, make, of)
    for step in range(2):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        assert_equal(grads(of), exchanged(simulation, of, step))


@pytest.mark.parametrize("kind", ["none", "terngrad", "topk"])
def test_disjoint_sets_of_ranks_train_by_themselves(several: Job, kind: str) -> None:
    job = several
    members = [list(range(0, job.size, 2)), list(range(1, job.size, 2))]
    ranks = members[job.rank % 2]
    subset = job.split(members)
    assert (subset.rank, subset.size) == (ranks.index(job.rank), len(ranks))
    of = parameters()

    def make(named: NamedParameters, **of_subset: Any) -> GradientCompression:
        return getattr(Compression, kind)(named, **OPTIONS if kind != "none" else {}, **of_subset)

    optimizer = job.distribute(sgd(of), of.items(), make(of.items(), **subset.of_compression), **subset.of_optimizer)
    simulation = Simulation(len(ranks), make, of)
    for step in range(3 + job.rank % 2):  # one set makes a step more
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        expected = simulation.exchange([gradients(of, rank, step) for rank in ranks])
        if kind == "none":
            assert_close(grads(of), expected)
        else:
            assert_equal(grads(of), expected)


def test_a_compression_without_the_process_set_of_its_optimizer_says_so(horovod: Job) -> None:
    job = horovod
    if job.size < 4:
        pytest.skip("needs a set of ranks that has company and is not all")
    subset = job.split([[0, 1], [2, 3]])
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS["bf16"](of.items()), **subset.of_optimizer)
    backward(of, gradients(of, job.rank, 0))
    with pytest.raises(RuntimeError, match="ranks of this compression"):
        optimizer.step()
