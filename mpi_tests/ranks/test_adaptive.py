"""Rates that rank 0 chooses, in real jobs: at the same step everywhere, and the same as in the simulation."""

import io
import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_compress import Compression, GradientCompression
from hvd_compress.adaptive import Accordion

from .job import Job, NamedParameters
from .training import (
    OPTIONS,
    Gradients,
    MakeCompression,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    copy,
    gradients,
    parameters,
    residuals,
    sgd,
)

SHAPES = {"a": (40, 50), "b": (30, 60), "c": (64, 64)}
INTERVAL = 4
BASES: dict[str, MakeCompression] = {
    "qsgd": lambda named: Compression.qsgd(named, **OPTIONS),
    "topk": lambda named: Compression.topk(named, density=0.05, **OPTIONS),
    "adacomp": lambda named: Compression.adacomp(named, bin_size=50, **OPTIONS),
    "powersgd": lambda named: Compression.powersgd(named, approximation_rank=4, **OPTIONS),
}


def lgreco(kind: str, **options: Any) -> MakeCompression:
    def make(named: NamedParameters) -> GradientCompression:
        return Compression.lgreco(BASES[kind](named), **({"interval": INTERVAL, "window": 2} | options))

    return make


def known(of: dict[str, Tensor], rank: int, step: int) -> Gradients:
    """Of different sizes, so that one rate for all is not the best."""
    factors = dict(zip(of, (1.0, 20.0, 0.1)))
    return {name: gradient.pow(3) * factors[name] for name, gradient in gradients(of, rank, step).items()}


class Training:
    """Steps of a small model, and the rates that each of them was exchanged at."""

    def __init__(self, job: Job, make: MakeCompression) -> None:
        self.rank = job.rank
        self.of = parameters(SHAPES)
        self.compression = make(self.of.items())
        self.optimizer = job.distribute(sgd(self.of, momentum=0.9), self.of.items(), self.compression)
        self.rates: list[list[Any]] = []

    def step(self, step: int, delay: float = 0.0) -> Gradients:
        self.optimizer.zero_grad()
        time.sleep(delay)
        order = list(self.of) if (self.rank + step) % 2 else list(reversed(self.of))
        backward(self.of, known(self.of, self.rank, step), order)
        self.optimizer.step()
        self.rates.append([slot.rate for slot in self.compression.slots])
        return {name: p.grad.clone() for name, p in self.of.items() if p.grad is not None}

    def load(self, parameters: dict[str, Tensor], optimizer: Any, compression: Any) -> None:
        with torch.no_grad():
            for name, p in self.of.items():
                p.copy_(parameters[name])
        self.optimizer.load_state_dict(optimizer)
        self.compression.load_state_dict(compression)


def delays(job: Job, steps: int) -> list[float]:
    """Of this rank: up to 0.3 s in the step before a decision, in that of the decision, or in the next."""
    draw = random.Random(job.rank)
    waits = [0.0] * steps
    waits[INTERVAL - 1 + job.rank % 3] = draw.uniform(0.1, 0.3)
    waits[2 * INTERVAL + (job.rank + 1) % 2] = draw.uniform(0.05, 0.2)
    return waits


@pytest.mark.parametrize("kind", BASES)
def test_all_ranks_change_rates_at_the_same_step_whatever_the_delays(several: Job, kind: str) -> None:
    job = several
    training = Training(job, lgreco(kind))
    for step, delay in enumerate(delays(job, 11)):
        training.step(step, delay)
    rates = training.rates
    assert rates[: INTERVAL + 1] == [[None] * 3] * (INTERVAL + 1)
    first, second = rates[INTERVAL + 1], rates[2 * INTERVAL + 1]
    assert rates[INTERVAL + 1 :] == [first] * INTERVAL + [second] * 2
    assert len(set(first)) > 1
    assert training.compression.controller is not None
    assert training.compression.controller.number == 2
    assert all(theirs == rates for theirs in job.allgather(rates))
    assert_replicated(job, training.of)


@pytest.mark.parametrize("kind", ["qsgd", "topk", "adacomp"])
def test_a_job_chooses_as_simulated_ranks_do(several: Job, kind: str) -> None:
    job = several
    training = Training(job, lgreco(kind))
    simulation = Simulation(job.size, lgreco(kind), training.of)
    for step in range(7):
        expected = simulation.exchange([known(training.of, rank, step) for rank in range(job.size)])
        assert_equal(training.step(step), expected)
    assert training.rates[-1] != training.rates[0]


def through_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("kind", ["topk", "powersgd"])
@pytest.mark.parametrize("saved_at", [7, 9])
def test_resumed_in_mid_interval_equals_uninterrupted_to_the_bit(job: Job, kind: str, saved_at: int) -> None:
    first, resumed = Training(job, lgreco(kind)), Training(job, lgreco(kind))
    for step in range(saved_at):
        first.step(step)
    state = job.allgather(first.compression.gather_state_dict())[0]  # as written by rank 0 and read by all
    resumed.load(*through_file([copy(first.of), first.optimizer.state_dict(), state]))
    for training in (first, resumed):
        for step in range(saved_at, 11):
            training.step(step)
    if kind == "powersgd" and job.is_horovod and job.size > 2:  # which may add up in another order each time
        assert_close(resumed.of, first.of, 1e-4)
        assert_close(residuals(resumed.compression), residuals(first.compression), 1e-2)  # sums of hundreds cancel
    else:
        assert_equal(resumed.of, first.of)
        assert_equal(residuals(resumed.compression), residuals(first.compression))
    assert resumed.rates[-1] == first.rates[-1]


@pytest.mark.usefixtures("optimizers")
@pytest.mark.parametrize("objective", ["bytes", "time"])
def test_two_may_decide_in_the_same_step(job: Job, objective: str) -> None:
    """Their hooks fire in an order that differs by rank."""
    sides = []
    for kind in ("topk", "powersgd"):
        of = parameters(SHAPES)
        named = {f"{kind}.{name}": p for name, p in of.items()}
        compression = lgreco(kind, interval=2, objective=objective)(named.items())
        sides.append((of, compression, job.distribute(sgd(of), named.items(), compression)))
    for step in range(6):
        for of, _, optimizer in sides if (job.rank + step) % 2 else reversed(sides):
            optimizer.zero_grad()
            backward(of, known(of, job.rank, step))
        for _, _, optimizer in sides:
            optimizer.step()
    for of, compression, _ in sides:
        assert compression.controller is not None
        assert compression.controller.number == (2 if job.size > 1 else 0)
        assert_replicated(job, of)


@pytest.mark.parametrize("kind", ["powersgd", "topk"])
def test_the_link_is_measured_on_the_jobs_own_transport(several: Job, kind: str) -> None:
    job = several
    training = Training(job, lgreco(kind, objective="time"))
    controller: Any = training.compression.controller
    measured = []
    for step in range(6):
        training.step(step)
        measured.append(len(controller.link.samples))
    once = measured[0]
    assert measured == [once] * 3 + [2 * once] * 3  # in the first step, and in the one before the decision
    link = controller.link.fit()
    assert link.bandwidth_bytes_per_second > 0
    assert link.latency_seconds >= 0
    assert controller.number == 1
    assert all(theirs == training.rates for theirs in job.allgather(training.rates))
    assert_replicated(job, training.of)


def test_accordion_as_the_reference(several: Job) -> None:
    job = several
    training = Training(job, lgreco("powersgd", reference=Accordion(low=8, high=2)))
    for step in range(10):
        training.step(step)
    assert training.rates[0] == [8, 8, 8]
    assert all(theirs == training.rates for theirs in job.allgather(training.rates))
    assert_replicated(job, training.of)


@pytest.mark.parametrize("kind", ["qsgd", "powersgd"])
def test_accordion_decides_alike_on_all_ranks_from_what_they_received(several: Job, kind: str) -> None:
    job = several
    low, high = {"qsgd": (8, 2), "powersgd": (4, 1)}[kind]

    def make(named: NamedParameters) -> GradientCompression:
        return Compression.accordion(BASES[kind](named), low, high, interval=INTERVAL)

    training = Training(job, make)
    received = [training.step(step) for step in range(2 * INTERVAL + 2)]
    controller: Any = training.compression.controller
    assert controller.number == 2
    for name, norm in controller.state_dict()["norms"].items():
        mean = torch.stack([received[step][name].double() for step in range(INTERVAL, 2 * INTERVAL)]).mean(0)
        assert norm == pytest.approx(float(mean.norm()), rel=1e-5)
    told = training.rates, controller.state_dict()
    assert all(theirs == told for theirs in job.allgather(told))
    assert_replicated(job, training.of)
