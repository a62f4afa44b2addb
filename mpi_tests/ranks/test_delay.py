"""delay=1 on every back end: a step applies the gradients of the one before, and none are lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hvd_compress import Compression, GradientCompression

from .job import Job, NamedParameters
from .test_checkpoint import through_file
from .training import (
    COMPRESSIONS,
    IN_FRAMES,
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
    takes_part,
)


def delayed(kind: str, named: NamedParameters) -> GradientCompression:
    """As of COMPRESSIONS, one step late."""
    named = list(named)
    usual = COMPRESSIONS[kind](named)
    usual.unregister()
    return GradientCompression(usual.compressor, named, **usual.options.by_name() | {"delay": 1})


def zeros(of: dict[str, Tensor]) -> Gradients:
    return {name: torch.zeros_like(p) for name, p in of.items()}


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_step_has_the_gradients_of_the_one_before(job: Job, kind: str) -> None:
    """Those without delay are known from the simulation, and no compressor sees the delay."""
    of = parameters()
    compression = delayed(kind, of.items())
    optimizer = job.distribute(sgd(of), of.items(), compression)
    simulation = Simulation(job.size, COMPRESSIONS[kind], of)
    late = job.size > 1
    expected = zeros(of)
    for step in range(4):
        if step == 2 and job.backend != "torch":
            for p in of.values():
                p.grad.zero_()  # which must not reach what is under way
        else:
            optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        now = simulation.exchange([gradients(of, rank, step) for rank in range(job.size)])
        expected, last = (expected, now) if late else (now, now)
        if kind in IN_FRAMES:
            assert_equal(grads(of), expected)
        else:
            assert_close(grads(of), expected, 1e-2 if kind == "fp16" else 1e-6)
        expected = last
    before = copy(of)
    optimizer.zero_grad()
    assert compression.flush(optimizer) == late
    if late:
        assert_close(copy(of), {name: before[name] - 0.1 * last[name] for name in of}, 1e-2 if kind == "fp16" else 1e-6)
    assert not compression.flush(optimizer)  # there is nothing left
    assert_replicated(job, of)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_grad_scaler_skips_the_step_that_would_apply_what_overflowed(several: Job, bad: float) -> None:
    """The scale changes between a gradient and its step, and is that of neither when it is applied."""
    of, alone = parameters(), parameters()
    compression = Compression.topk(of.items(), density=1.0, min_numel=1, delay=1)
    optimizer = several.distribute(sgd(of, momentum=0.9), of.items(), compression)
    reference = sgd(alone, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    means, scales = [], []
    for step in range(7):
        of_ranks = [gradients(alone, rank, step) for rank in range(several.size)]
        if bad and step == 3:
            of_ranks[-1]["b"].view(-1)[7] = bad
        means.append({name: sum(mine[name] for mine in of_ranks) / several.size for name in alone})
        scales.append(scaler.get_scale())
        compression.loss_scale = scales[-1]
        optimizer.zero_grad()
        mine = of_ranks[several.rank]
        scaler.scale(sum((p * mine[name]).sum() for name, p in of.items())).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        applied = means[-2] if step else zeros(alone)
        if all(bool(gradient.isfinite().all()) for gradient in applied.values()):
            for name, parameter in alone.items():
                parameter.grad = applied[name]
            reference.step()
        assert_close(copy(of), copy(alone), 1e-4)
    assert len(set(scales)) > 2
    assert_replicated(several, of)


@pytest.mark.parametrize("kind", ["none", "topk", "scattered", "powersgd", "dgc"])
def test_a_checkpoint_has_what_is_under_way(several: Job, kind: str) -> None:
    def start() -> tuple:
        of = parameters()
        compression = delayed(kind, of.items())
        momentum = 0.0 if takes_part(several.size, compression) and kind == "dgc" else 0.9
        return of, compression, several.distribute(sgd(of, momentum=momentum), of.items(), compression)

    def run(of: dict[str, Tensor], optimizer, steps: range) -> dict[str, Tensor]:
        for step in steps:
            optimizer.zero_grad()
            backward(of, gradients(of, several.rank, step))
            optimizer.step()
        return copy(of)

    of, compression, optimizer = start()
    run(of, optimizer, range(3))
    saved = through_file([copy(of), optimizer.state_dict(), compression.state_dict()])
    assert any(name.endswith("/delayed") for name in saved[2]["residuals"][several.rank])
    uninterrupted = run(of, optimizer, range(3, 6))
    resumed, compression, optimizer = start()
    with torch.no_grad():
        for name, p in resumed.items():
            p.copy_(saved[0][name])
    optimizer.load_state_dict(saved[1])
    compression.load_state_dict(saved[2])
    assert_close(run(resumed, optimizer, range(3, 6)), uninterrupted, 1e-6)


def test_gradients_that_are_thrown_away_are_not_applied_later(several: Job) -> None:
    """Of step 1 no step is made, so that step 2 applies zeros, and residuals are those of step 0."""
    of = parameters()
    optimizer = several.distribute(sgd(of), of.items(), delayed("topk", of.items()))
    simulation = Simulation(several.size, COMPRESSIONS["topk"], of)
    expected = []
    for step in range(4):
        optimizer.zero_grad()
        backward(of, gradients(of, several.rank, step))
        optimizer.synchronize()
        if step != 1:
            expected.append(simulation.exchange([gradients(of, rank, step) for rank in range(several.size)]))
            with optimizer.skip_synchronize():
                optimizer.step()
        if step == 2:
            assert_equal(grads(of), zeros(of))
        if step == 3:
            assert_equal(grads(of), expected[1])


@pytest.mark.usefixtures("optimizers")
def test_a_parameter_without_a_gradient_gets_that_of_the_step_before(several: Job) -> None:
    of = parameters()
    optimizer = several.distribute(sgd(of), of.items(), delayed("none", of.items()))
    simulation = Simulation(several.size, COMPRESSIONS["none"], of)
    every = [gradients(of, rank, 0) for rank in range(several.size)]
    backward(of, every[several.rank])
    optimizer.step()
    optimizer.zero_grad()
    backward(of, {"a": gradients(of, several.rank, 1)["a"]})
    optimizer.step()
    assert_close(grads(of), simulation.exchange(every), 1e-6)


@pytest.mark.usefixtures("plain_mpi")
def test_a_closure_is_refused(several: Job) -> None:
    of = parameters()
    optimizer = several.distribute(torch.optim.LBFGS(of.values()), of.items(), delayed("topk", of.items()))
    with pytest.raises(ValueError, match="leave out one of them"):
        optimizer.step(lambda: torch.zeros(()))
