"""Parameters as models have them: unused, frozen, of other types, sparse, in any order."""

import pytest
import torch
from torch import nn

from hvd_compress import Compression

from .job import Job
from .training import (
    COMPRESSIONS,
    IN_FRAMES,
    IN_SUMS,
    OPTIONS,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    copy,
    gradients,
    grads,
    parameters,
    residuals,
    sgd,
)


def shuffled(names, seed: int) -> list[str]:
    names = list(names)
    return [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]


MANY = {f"p{i}": (10 + i, 20) for i in range(8)}


@pytest.mark.parametrize(
    ("kind", "bucket_bytes"), [("adacomp", 1), ("adacomp", 3000), ("terngrad", 1), ("terngrad", 1 << 20)]
)
def test_gradients_may_become_ready_in_any_order(job: Job, kind: str, bucket_bytes: int) -> None:
    of = parameters(MANY)

    def make(named):
        return getattr(Compression, kind)(named, min_numel=1, bucket_bytes=bucket_bytes)

    ready: list[str] = []
    for name, p in of.items():
        p.register_post_accumulate_grad_hook(lambda p, name=name: ready.append(name))
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()))
    simulation = Simulation(job.size, make, of)
    for step in range(4):
        order = shuffled(of, 10 * step + job.rank)
        ready.clear()
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step), order)
        assert ready == order  # else this tests nothing
        optimizer.step()
        assert_equal(grads(of), simulation.exchange([gradients(of, rank, step) for rank in range(job.size)]))


@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize(
    ("kind", "bucket_bytes"),
    [("none", 1), ("bf16", 1), ("terngrad", 1), ("terngrad", 1 << 20), ("adacomp", 1), ("topk", 1 << 20)],
)
def test_parameters_that_only_some_ranks_use_count_as_zeros_elsewhere(job: Job, kind: str, bucket_bytes: int) -> None:
    of = parameters(MANY)
    options = {} if kind == "none" else {"min_numel": 1}

    def make(named):
        return getattr(Compression, kind)(named, bucket_bytes=bucket_bytes, **options)

    def used(rank: int, step: int) -> list[str]:
        """A third of them, in an order of its own; in step 2 rank 0 uses none."""
        return [] if (rank, step) == (0, 2) else shuffled(of, 10 * step + rank)[:3]

    optimizer = job.distribute(sgd(of), of.items(), make(of.items()))
    simulation = Simulation(job.size, make, of)
    for step in range(4):
        optimizer.zero_grad()
        names = used(job.rank, step)
        known = gradients(of, job.rank, step)
        if names:
            backward(of, {name: known[name] for name in names}, names)
        optimizer.step()
        anywhere = {name for rank in range(job.size) for name in used(rank, step)}
        if job.is_horovod:  # it gives zeros to a parameter that no rank uses; hvd_compress.mpi none, as torch
            anywhere = set(of)
        of_ranks = [
            {
                name: g if name in used(rank, step) else torch.zeros_like(g)
                for name, g in known.items()
                if name in anywhere
            }
            for rank in range(job.size)
            for known in [gradients(of, rank, step)]
        ]
        if job.size == 1:
            assert_equal(grads(of), {name: known[name] for name in of if name in names})
        elif kind == "none":
            assert_close(grads(of), simulation.exchange(of_ranks))
        else:
            assert_equal(grads(of), simulation.exchange(of_ranks))


@pytest.mark.parametrize("kind", ["none", "terngrad", "topk"])
def test_a_parameter_frozen_before_wrapping_takes_no_part(job: Job, kind: str) -> None:
    of = parameters()
    of["b"].requires_grad_(False)
    frozen = of["b"].clone()
    compression = COMPRESSIONS[kind](of.items())
    optimizer = job.distribute(sgd(of), of.items(), compression)
    for step in range(3):
        optimizer.zero_grad()
        backward(of, {name: g for name, g in gradients(of, job.rank, step).items() if name != "b"})
        optimizer.step()
    assert of["b"].grad is None
    assert torch.equal(of["b"], frozen)
    assert "b" not in residuals(compression)
    assert_replicated(job, of)


@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize("kind", ["none", *IN_FRAMES])
def test_a_parameter_frozen_during_training_stays_as_it_is(job: Job, kind: str) -> None:
    """Also when some of its gradient still waits in a residual."""
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS[kind](of.items()))
    for step in range(5):
        if step == 2:
            of["b"].requires_grad_(False)
            frozen = of["b"].clone()
        optimizer.zero_grad()
        trained = {name: g for name, g in gradients(of, job.rank, step).items() if of[name].requires_grad}
        backward(of, trained)
        optimizer.step()
    assert torch.equal(of["b"], frozen)
    assert_replicated(job, of)


@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize("kind", ["none", "terngrad", "adacomp"])
def test_a_parameter_frozen_for_a_while_trains_again(job: Job, kind: str) -> None:
    of = parameters()
    make = COMPRESSIONS[kind]
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()))
    for step in range(6):
        of["b"].requires_grad_(step not in (2, 3))
        optimizer.zero_grad()
        trained = {name: g for name, g in gradients(of, job.rank, step).items() if of[name].requires_grad}
        before = of["b"].detach().clone()
        backward(of, trained)
        optimizer.step()
        assert torch.equal(of["b"], before) == (step in (2, 3))
        assert_replicated(job, of)


@pytest.mark.parametrize("kind", ["none", *IN_FRAMES])
def test_a_parameter_frozen_before_wrapping_may_be_unfrozen(plain_mpi: Job, kind: str) -> None:
    """Horovod would train it on each rank by itself: it adds its hooks when it wraps."""
    job = plain_mpi
    of = parameters()
    make = COMPRESSIONS[kind]
    of["b"].requires_grad_(False)
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()))
    simulation = Simulation(job.size, make, of)
    for step in range(5):
        of["b"].requires_grad_(step >= 2)
        optimizer.zero_grad()
        names = [name for name in of if of[name].requires_grad]
        backward(of, {name: gradients(of, job.rank, step)[name] for name in names})
        optimizer.step()
        known = [gradients(of, rank, step) for rank in range(job.size)]
        expected = simulation.exchange([{name: of_rank[name] for name in names} for of_rank in known])
        if kind == "none":
            assert_close(grads(of), expected)
        else:
            assert_equal(grads(of), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_gradients_keep_their_type(job: Job, kind: str, dtype: torch.dtype) -> None:
    of = parameters(dtype=dtype)
    make = COMPRESSIONS[kind]
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()))
    simulation = Simulation(job.size, make, of)
    for step in range(2):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        assert {p.grad.dtype for p in of.values()} == {dtype}
        expected = simulation.exchange([gradients(of, rank, step) for rank in range(job.size)])
        if kind in IN_FRAMES:
            assert_equal(grads(of), expected)
        else:
            # Several rounds in float32 add up to more than one rounding of it.
            least = {"fp16": torch.finfo(torch.float16).eps} | dict.fromkeys(IN_SUMS, 1e-6)
            assert_close(grads(of), expected, 8 * max(torch.finfo(dtype).eps, least.get(kind, 0.0)))
    assert_replicated(job, of)


def test_float64_is_averaged_in_float64(several: Job) -> None:
    job = several
    of = parameters(dtype=torch.float64)
    optimizer = job.distribute(sgd(of), of.items(), Compression.none(of.items()))
    known = [{name: torch.full_like(p, 1 + 2.0**-40 * rank) for name, p in of.items()} for rank in range(job.size)]
    backward64 = sum((p * known[job.rank][name]).sum() for name, p in of.items())
    backward64.backward()
    optimizer.step()
    mean = 1 + 2.0**-40 * (job.size - 1) / 2
    assert all(torch.allclose(p.grad, torch.full_like(p, mean), rtol=0, atol=1e-15) for p in of.values())


@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_sparse_gradients_pass_beside_compressed_ones(job: Job, kind: str) -> None:
    torch.manual_seed(0)
    embedding, linear = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 30, bias=False)
    named = [("embedding", embedding.weight), ("linear", linear.weight)]
    optimizer = job.distribute(torch.optim.SGD([p for _, p in named], lr=0.1), named, COMPRESSIONS[kind](named))
    linear_only = {"linear": linear.weight}
    for step in range(4):
        words = [
            torch.randint(0, 50, (3 + rank,), generator=torch.Generator().manual_seed(10 * step + rank))
            for rank in range(job.size)
        ]
        weights = [gradients({"w": torch.empty(3 + rank, 8)}, rank, step)["w"] for rank in range(job.size)]
        optimizer.zero_grad()
        known = gradients(linear_only, job.rank, step)
        ((embedding(words[job.rank]) * weights[job.rank]).sum() + (linear.weight * known["linear"]).sum()).backward()
        optimizer.synchronize()
        expected = torch.zeros(50, 8)
        for of_rank, weight in zip(words, weights):
            expected.index_add_(0, of_rank, weight)
        assert embedding.weight.grad.is_sparse
        torch.testing.assert_close(embedding.weight.grad.to_dense(), expected / job.size)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert_replicated(job, dict(named))


@pytest.mark.parametrize("kind", ["adacomp", "topk"])
def test_small_excluded_and_flat_parameters_are_not_compressed(several: Job, kind: str) -> None:
    job = several
    of = parameters({"large": (30, 40), "small": (5, 5), "flat": (2000,), "head.weight": (30, 40)})
    compression = getattr(Compression, kind)(of.items(), min_numel=1000, exclude="head.*")
    optimizer = job.distribute(sgd(of), of.items(), compression)
    for step in range(2):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        known = [gradients(of, rank, step) for rank in range(job.size)]
        mean = {name: sum(of_rank[name] for of_rank in known) / job.size for name in of}
        assert_close(*({name: t for name, t in tensors.items() if name != "large"} for tensors in (grads(of), mean)))
        assert not torch.allclose(of["large"].grad, mean["large"], atol=1e-3)
    assert residuals(compression).keys() == {"large"}


@pytest.mark.parametrize("kind", IN_FRAMES)
def test_the_order_of_names_may_differ_from_that_of_the_optimizer(job: Job, kind: str) -> None:
    of = parameters(MANY)
    bound = {name: of[name] for name in shuffled(of, 1)}
    passed = {name: of[name] for name in shuffled(of, 2)}
    make = COMPRESSIONS[kind]
    optimizer = job.distribute(sgd(of), passed.items(), make(bound.items()))
    simulation = Simulation(job.size, make, bound)
    for step in range(3):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        assert_equal(grads(of), simulation.exchange([gradients(of, rank, step) for rank in range(job.size)]))


def test_empty_and_single_element_parameters_pass(job: Job) -> None:
    of = parameters({"empty": (0, 4), "one": (1, 1), "scalar": (), "a": (30, 20)})
    optimizer = job.distribute(sgd(of), of.items(), Compression.topk(of.items(), **OPTIONS))
    for step in range(2):
        before = copy(of)
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        known = [gradients(of, rank, step) for rank in range(job.size)]
        for name in ("one", "scalar"):
            mean = sum(of_rank[name] for of_rank in known) / job.size
            torch.testing.assert_close(of[name].grad, mean)
            assert not torch.equal(of[name], before[name])
    assert_replicated(job, of)
