"""Two optimizers, each with a compression of its own, in one process."""

import pytest

from hvd_compress import Compression

from .job import Job
from .training import COMPRESSIONS, Simulation, assert_equal, backward, gradients, grads, parameters, sgd

SHAPES = {"a": (30, 20), "b": (20, 40)}
PAIRS = [("terngrad", "adacomp"), ("topk", "topk"), ("bf16", "terngrad")]


class Side:
    """One of the two models with all that belongs to it."""

    def __init__(self, job: Job, kind: str, seed: int) -> None:
        self.rank, self.size, self.seed = job.rank, job.size, seed
        self.of = parameters(SHAPES)
        # Horovod names its own collectives after the parameters: two optimizers need two sets of names.
        named = {f"{seed}.{name}": p for name, p in self.of.items()}
        self.optimizer = job.distribute(sgd(self.of), named.items(), COMPRESSIONS[kind](named.items()))
        self.simulation = Simulation(job.size, COMPRESSIONS[kind], self.of)

    def backward(self, step: int) -> None:
        self.optimizer.zero_grad()
        order = list(self.of) if (self.rank + step) % 2 else list(reversed(self.of))
        backward(self.of, gradients(self.of, self.rank, step, self.seed), order)

    def step(self, step: int) -> None:
        self.optimizer.step()
        known = [gradients(self.of, rank, step, self.seed) for rank in range(self.size)]
        assert_equal(grads(self.of), self.simulation.exchange(known))


@pytest.mark.parametrize("kinds", PAIRS)
def test_they_may_step_in_turn(job: Job, kinds: tuple[str, str]) -> None:
    sides = [Side(job, kind, seed) for seed, kind in enumerate(kinds)]
    for step in range(6):
        side = sides[step % 2]
        side.backward(step)
        side.step(step)


@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize("kinds", PAIRS)
def test_both_may_have_gradients_under_way_at_once(job: Job, kinds: tuple[str, str]) -> None:
    """Begun in an order that differs by rank, ended in one that is the same."""
    sides = [Side(job, kind, seed) for seed, kind in enumerate(kinds)]
    for step in range(4):
        for side in sides if (job.rank + step) % 2 else reversed(sides):
            side.backward(step)
        for side in sides:
            side.step(step)


@pytest.mark.usefixtures("optimizers")
def test_one_backward_may_reach_both(job: Job) -> None:
    """As of a generator whose loss runs through its discriminator."""
    sides = [Side(job, kind, seed) for seed, kind in enumerate(("adacomp", "terngrad"))]
    for step in range(4):
        known = [gradients(side.of, job.rank, step, side.seed) for side in sides]
        order = [(number, name) for name in SHAPES for number in (0, 1)]
        if (job.rank + step) % 2:
            order.reverse()
        for side in sides:
            side.optimizer.zero_grad()
        sum((sides[number].of[name] * known[number][name]).sum() for number, name in order).backward()
        for side in sides:
            side.step(step)


def test_a_compression_that_is_gone_leaves_no_trace(job: Job) -> None:
    for kind in ("topk", "adacomp", "topk"):
        side = Side(job, kind, 0)
        for step in range(2):
            side.backward(step)
            side.step(step)
        del side


def test_one_compression_may_serve_the_next_optimizer(job: Job) -> None:
    """As when an optimizer is made anew for fine-tuning, with its residuals; the hooks of the old one are gone."""
    of = parameters(SHAPES)
    pairs = [(f"serve.{name}", p) for name, p in of.items()]
    if job.is_horovod and job.size > 1:
        pytest.skip("Horovod's optimizers keep their hooks: a model can be wrapped only once")
    compression = Compression.topk(pairs, density=0.1, min_numel=1)
    simulation = Simulation(job.size, lambda named: Compression.topk(named, density=0.1, min_numel=1), dict(pairs))
    optimizer = None
    for step in range(4):
        if step % 2 == 0:
            del optimizer
            optimizer = job.distribute(sgd(of), pairs, compression)
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        known = [gradients(of, rank, step) for rank in range(job.size)]
        expected = simulation.exchange([{f"serve.{name}": g for name, g in mine.items()} for mine in known])
        assert_equal({f"serve.{name}": g for name, g in grads(of).items()}, expected)
