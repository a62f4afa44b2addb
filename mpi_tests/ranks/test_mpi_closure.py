"""Optimizers that evaluate the model themselves, through a closure, under hvd_compress.mpi."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hvd_compress import Compression

from .job import Job
from .training import (
    COMPRESSIONS,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    gradients,
    grads,
    parameters,
    residuals,
    sgd,
)

pytestmark = pytest.mark.usefixtures("plain_mpi")


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(32, 6, generator=generator).double(), torch.randn(32, 3, generator=generator).double()


SEVERAL_EVALUATIONS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "lbfgs": lambda of: torch.optim.LBFGS(of, lr=0.5, max_iter=5),
    "lbfgs, line search": lambda of: torch.optim.LBFGS(of, max_iter=6, line_search_fn="strong_wolfe"),
    "sgd": lambda of: torch.optim.SGD(of, lr=0.1, momentum=0.9),
    "rprop": lambda of: torch.optim.Rprop(of, lr=0.01),
}


@pytest.mark.parametrize("op", ["average", "sum"])
@pytest.mark.parametrize("kind", SEVERAL_EVALUATIONS)
def test_closures_train_as_one_process_does(job: Job, kind: str, op: str) -> None:
    factor = 1 if op == "average" else job.size

    def train(distributed: bool) -> tuple[nn.Module, list[float], int]:
        model = model_of()
        optimizer = SEVERAL_EVALUATIONS[kind](model.parameters())
        if distributed:
            named = list(model.named_parameters())
            optimizer = job.distribute(optimizer, named, Compression.none(named), op=op)
        evaluations, losses = 0, []

        def closure() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            ranks = [job.rank] if distributed else range(job.size)
            loss = sum((model(x) - y).pow(2).mean() for x, y in map(data, ranks)) / len(ranks)
            loss = loss if distributed else loss * factor
            loss.backward()
            return loss

        for _ in range(4):
            losses.append(float(optimizer.step(closure)))
        return model, losses, evaluations

    (model, losses, evaluations), (alone, expected, expected_evaluations) = train(True), train(False)
    assert evaluations == expected_evaluations
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    assert_close(dict(model.named_parameters()), dict(alone.named_parameters()), 1e-8)
    assert_replicated(job, dict(model.named_parameters()))
    assert len(set(job.allgather(tuple(losses)))) == 1


@pytest.mark.parametrize("of_rank", [float, int, torch.tensor, lambda rank: torch.tensor([float(rank)])])
def test_the_loss_of_a_closure_is_that_of_all_ranks(job: Job, of_rank: Callable[[int], object]) -> None:
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()))

    def closure() -> object:
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, 0))
        return of_rank(4 * job.rank)

    loss = optimizer.step(closure)
    assert float(loss) == 2 * (job.size - 1)
    if isinstance(given := of_rank(1), Tensor):
        assert (loss.shape, loss.dtype) == (given.shape, given.dtype)


def test_a_closure_may_return_nothing(job: Job) -> None:
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()))
    assert optimizer.step(lambda: backward(of, gradients(of, job.rank, 0))) is None
    assert optimizer.step(lambda: (backward(of, gradients(of, job.rank, 0)), "loss")[1:]) == ("loss",)


def test_residuals_follow_every_evaluation(job: Job) -> None:
    """An optimizer that goes by all of its gradients owes what was not sent of any."""
    of = parameters()
    make = COMPRESSIONS["topk"]
    compression = make(of.items())
    optimizer = job.distribute(torch.optim.LBFGS(of.values(), lr=0.01, max_iter=3), of.items(), compression)
    simulation = Simulation(job.size, make, of)
    seen = []

    def closure() -> float:
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, len(seen)))
        seen.append(None)
        return 1.0 / len(seen)

    for _ in range(2):
        optimizer.step(closure)
    assert len(seen) >= 4
    for step in range(len(seen)):
        expected = simulation.exchange([gradients(of, rank, step) for rank in range(job.size)])
    assert_equal(grads(of), expected)
    if job.size > 1:
        assert_equal(residuals(compression), simulation.residuals(job.rank))
