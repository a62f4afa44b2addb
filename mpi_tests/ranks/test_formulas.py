"""What comes out of `synchronize()`, against the algorithms' formulas written down here a second time."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_compress import Compression

from .job import Job
from .training import OPTIONS, Simulation, assert_equal, backward, gradients, grads, parameters, residuals, sgd

SHAPES = {"matrix": (60, 50), "conv": (6, 4, 5, 5)}
BIN_SIZES = {"matrix": 500, "conv": 50}
DENSITY = 0.03
STEPS = 5


def adacomp(name: str, residual: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What one rank sends, and its new residual; float32 [numel]."""
    accumulated = residual + gradient
    pushed = accumulated + gradient
    sent = np.zeros_like(accumulated)
    starts = range(0, accumulated.size, BIN_SIZES[name])
    largest = [np.abs(accumulated[start : start + BIN_SIZES[name]]).max() for start in starts]
    scale = np.float32(np.mean(largest, dtype=np.float64))
    for start, reach in zip(starts, largest):
        for i in range(start, min(start + BIN_SIZES[name], accumulated.size)):
            if reach > 0 and abs(pushed[i]) >= reach:
                sent[i] = np.sign(accumulated[i]) * scale
    return sent, accumulated - sent


def topk(name: str, residual: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `adacomp`."""
    accumulated = residual + gradient
    largest = np.argsort(-np.abs(accumulated), kind="stable")[: math.ceil(DENSITY * accumulated.size)]
    sent = np.zeros_like(accumulated)
    sent[largest] = accumulated[largest]
    return sent, accumulated - sent


FORMULAS = {"adacomp": (adacomp, {}), "topk": (topk, {"density": DENSITY})}


@pytest.mark.parametrize("kind", FORMULAS)
def test_error_feedback_follows_the_formula_exactly(several: Job, kind: str) -> None:
    job = several
    formula, options = FORMULAS[kind]
    of = parameters(SHAPES)
    compression = getattr(Compression, kind)(of.items(), min_numel=1, **options)
    optimizer = job.distribute(sgd(of), of.items(), compression)
    expected_residuals = [{name: np.zeros(p.numel(), np.float32) for name, p in of.items()} for _ in range(job.size)]
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.synchronize()
        for name, p in of.items():
            total = np.zeros(p.numel(), np.float32)
            for rank in range(job.size):
                gradient = gradients(of, rank, step)[name].numpy().ravel()
                sent, expected_residuals[rank][name] = formula(name, expected_residuals[rank][name], gradient)
                total += sent
            expected = torch.from_numpy(total / np.float32(job.size)).view(p.shape)
            assert_equal({name: p.grad}, {name: expected})
        with optimizer.skip_synchronize():
            optimizer.step()
        assert_equal(
            residuals(compression), {name: torch.from_numpy(r) for name, r in expected_residuals[job.rank].items()}
        )


def terngrad_bound(gradient: Tensor) -> float:
    """The largest |value| after clipping to 2.5 standard deviations."""
    return min(float(gradient.abs().max()), 2.5 * float(gradient.double().std(correction=0)))


def test_terngrad_gives_whole_multiples_of_the_shared_scaler(several: Job) -> None:
    job = several
    of = parameters({"matrix": (60, 50)})
    optimizer = job.distribute(sgd(of), of.items(), Compression.terngrad(of.items(), min_numel=1))
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.synchronize()
        scaler = max(terngrad_bound(gradients(of, rank, step)["matrix"]) for rank in range(job.size))
        multiples = of["matrix"].grad * (job.size / scaler)
        assert (multiples - multiples.round()).abs().max() < 1e-5
        assert multiples.abs().max() <= job.size + 1e-5
        # The ranks draw independently: on a few thousand elements every sum occurs, but for the rarest.
        assert set(range(1 - job.size, job.size)) <= {int(multiple) for multiple in multiples.round().view(-1)}
        with optimizer.skip_synchronize():
            optimizer.step()


def values(rank: int) -> Tensor:
    """Away from 0, so that few draws tell much, and some large enough to be clipped."""
    generator = torch.Generator().manual_seed(rank)
    sign = torch.randint(0, 2, (8, 8), generator=generator) * 2.0 - 1
    gradient = sign * (0.2 + 0.8 * torch.rand(8, 8, generator=generator))
    gradient[0, :3] *= 5
    return gradient


def assert_unbiased(mean: Tensor, draws: int, size: int) -> None:
    """Within 5 standard errors of the mean of the clipped gradients."""
    bounds = [terngrad_bound(values(rank)) for rank in range(size)]
    clipped = [values(rank).clamp(-bound, bound) for rank, bound in enumerate(bounds)]
    assert any(not torch.equal(one, values(rank)) for rank, one in enumerate(clipped)), "nothing is clipped"
    scaler = max(bounds)
    variance = sum(one.abs() * scaler - one**2 for one in clipped) / size**2
    error = (variance.clamp(min=0) / draws).sqrt() + 1e-5
    assert ((mean - sum(clipped) / size).abs() / error).max() < 5


def test_terngrad_is_unbiased_but_for_the_clipping(several: Job) -> None:
    job = several
    of = parameters({"matrix": (8, 8)})
    optimizer = job.distribute(sgd(of), of.items(), Compression.terngrad(of.items(), min_numel=1))
    draws = 100
    total = torch.zeros(8, 8)
    for _ in range(draws):
        optimizer.zero_grad()
        backward(of, {"matrix": values(job.rank)})
        optimizer.synchronize()
        total += of["matrix"].grad
        with optimizer.skip_synchronize():
            optimizer.step()
    assert_unbiased(total / draws, draws, job.size)


def test_terngrad_is_unbiased_over_seeds(job: Job) -> None:
    if (job.backend, job.size) != ("mpi4py", 1):
        pytest.skip("simulated, hence the same everywhere: once is enough")
    of = parameters({"matrix": (8, 8)})
    size, draws = 3, 2000
    total = torch.zeros(8, 8)
    for seed in range(draws):
        simulation = Simulation(size, lambda named, seed=seed: Compression.terngrad(named, seed=seed, min_numel=1), of)
        total += simulation.exchange([{"matrix": values(rank)} for rank in range(size)])["matrix"]
    assert_unbiased(total / draws, draws, size)


@pytest.mark.parametrize("kind", ["terngrad", "adacomp", "topk", "bf16", "fp16"])
def test_one_rank_leaves_gradients_as_they_are(job: Job, kind: str) -> None:
    if job.size > 1:
        pytest.skip("of one rank only")
    of = parameters(SHAPES)
    compression = getattr(Compression, kind)(of.items(), **OPTIONS)
    optimizer = job.distribute(sgd(of), of.items(), compression)
    for step in range(2):
        optimizer.zero_grad()
        backward(of, gradients(of, 0, step))
        optimizer.step()
        assert_equal(grads(of), gradients(of, 0, step))
    assert residuals(compression) == {}
