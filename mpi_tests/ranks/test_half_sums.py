"""Sums in float16 that are too large for it, where their mean is not; and small numbers, which must not suffer."""

import pytest
import torch
from torch import Tensor

from hvd_compress import Compression

from .job import Job
from .training import assert_replicated, backward, copy, parameters, sgd

SHAPES = {"a": (30, 20), "flat": (40,)}


def exchanged(job: Job, kind: str, dtype: torch.dtype, known: dict[str, Tensor], bound: bool, op: str) -> dict:
    of = parameters(SHAPES, dtype)
    compression = getattr(Compression, kind)
    optimizer = job.distribute(sgd(of), of.items(), compression(of.items()) if bound else compression, op=op)
    backward(of, {name: g.to(dtype) for name, g in known.items()})
    optimizer.synchronize()
    combined = copy({name: p.grad for name, p in of.items()})
    assert_replicated(job, combined)
    with optimizer.skip_synchronize():
        optimizer.step()
    return combined


CASES = [("fp16", torch.float32), ("fp16", torch.float16), ("none", torch.float16)]


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_mean_that_fits_is_right_though_the_sum_does_not_fit(
    job: Job, kind: str, dtype: torch.dtype, bound: bool
) -> None:
    known = {name: torch.full(shape, 3e4) for name, shape in SHAPES.items()}
    known["a"][0, :10] = 1e-3 * (1 + job.rank)
    combined = exchanged(job, kind, dtype, known, bound, "average")
    known["a"][0, :10] = 1e-3 * (job.size + 1) / 2
    for name, mean in known.items():
        torch.testing.assert_close(combined[name].float(), mean, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("bound", [True, False])
def test_a_sum_that_does_not_fit_is_right_in_float32(job: Job, bound: bool) -> None:
    known = {name: torch.full(shape, 3e4) for name, shape in SHAPES.items()}
    combined = exchanged(job, "fp16", torch.float32, known, bound, "sum")
    for name, one in known.items():
        torch.testing.assert_close(combined[name], one * job.size, rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_what_is_not_finite_stays_so(several: Job, kind: str, dtype: torch.dtype, bad: float) -> None:
    job = several
    known = {name: torch.full(shape, 2.0) for name, shape in SHAPES.items()}
    if job.rank == 0:
        known["a"][3, 4] = bad
    combined = exchanged(job, kind, dtype, known, True, "average")
    assert not combined["a"][3, 4].isfinite()
    assert combined["a"].isfinite().sum() == 30 * 20 - 1
    assert torch.equal(combined["flat"].float(), known["flat"])


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_small_numbers_lose_no_more_than_the_last_bits_of_float16(job: Job, kind: str, dtype: torch.dtype) -> None:
    """hvd_compress.mpi divides none; under Horovod a number below 2**-14 times the ranks loses as many bits as they."""
    known = {name: torch.linspace(2e-6, 2e-4, torch.Size(shape).numel()).view(shape) for name, shape in SHAPES.items()}
    known = {name: g.to(dtype).float() for name, g in known.items()}
    combined = exchanged(job, kind, dtype, known, True, "average")
    unit = 2.0**-24 * (2 * job.size if job.is_horovod and job.size > 1 else 1)
    for name, one in known.items():
        torch.testing.assert_close(combined[name].float(), one, rtol=2e-3, atol=unit)
