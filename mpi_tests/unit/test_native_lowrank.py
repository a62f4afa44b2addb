"""PowerSGD's kernels: the same bits at every level, and what float64 makes of the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvd_compress import kernels
from hvd_compress.kernels import lowrank, native, reference

from .drive import bits, random
from .test_native import DTYPES, LEVELS

# Rows and columns below, at and above what is held in registers, in a cache and in one tile.
SHAPES = ((1, 1), (1, 40), (40, 1), (2, 8), (3, 7), (8, 9), (17, 33), (64, 147), (9, 2049), (5, 4100), (600, 700))
RANKS = (1, 2, 3, 4, 5, 8, 9)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)

pytestmark = pytest.mark.skipif(not LEVELS, reason="the C++ kernels are not built")


def at_every_level(compute):
    """What `compute` gives, which must be the same bits at every level: a tuple of tensors and numbers."""
    before, outcomes = kernels.in_use(), []
    try:
        for level in LEVELS:
            assert kernels.use(level) == level
            outcomes.append(compute())
    finally:
        kernels.use(before)
    shown = [[bits(part) if isinstance(part, torch.Tensor) else part for part in outcome] for outcome in outcomes]
    assert all(other == shown[0] for other in shown)
    return outcomes[0]


def guarded(numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for `numel` floats, aligned to four bytes alone, and the whole that it is a part of."""
    whole = torch.full((numel + 9,), 77.0)
    return whole, whole[1 : 1 + numel]


def untouched(whole: torch.Tensor, numel: int) -> bool:
    return bool((whole[:1] == 77).all()) and bool((whole[1 + numel :] == 77).all())


def factors(shape, rank, seed=0):
    """A left factor, [rows, rank], and lines, [rank, columns]; of the right size for sums of numbers around 1."""
    rows, columns = shape
    left = random(rows, rank, seed=seed + 1) / rows**0.5
    return left, random(rank, columns, seed=seed + 2) / columns**0.5


def close(found, expected, scale) -> bool:
    return bool(np.abs(found.double().numpy() - expected).max() <= 4e-6 * scale)


@shapes
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_accumulates_is_projected_on_the_lines(shape, rank, dtype):
    rows, columns = shape
    gradient = random(rows * columns).to(dtype)
    _, lines = factors(shape, rank)
    for residual in (None, random(rows * columns, seed=5)):

        def project(residual=residual):
            whole, kept = guarded(rows * columns)
            left_whole, left = guarded(rows * rank)
            top = native.project(gradient, residual, kept, lines, left.view(rows, rank))
            assert untouched(whole, rows * columns)
            assert untouched(left_whole, rows * rank)
            return kept.clone(), left.clone(), top

        kept, left, top = at_every_level(project)
        expected = torch.empty(rows * columns)
        assert top == reference.accumulate(gradient, residual, expected)
        assert bits(kept) == bits(expected)
        matrix, right = expected.double().numpy().reshape(shape), lines.double().numpy().T
        scale = (np.abs(matrix) @ np.abs(right)).max()
        assert close(left.view(rows, rank), matrix @ right, scale)


@shapes
@pytest.mark.parametrize("rank", RANKS)
def test_rows_are_added_up_by_the_left_factor(shape, rank):
    rows, columns = shape
    matrix = random(rows * columns + 1, seed=3)[1:]
    left, _ = factors(shape, rank)

    def backproject():
        whole, lines = guarded(rank * columns)
        native.backproject(matrix, left, lines.view(rank, columns))
        assert untouched(whole, rank * columns)
        return (lines.clone(),)

    (lines,) = at_every_level(backproject)
    exact = matrix.double().numpy().reshape(shape)
    factor = left.double().numpy().T
    assert close(lines.view(rank, columns), factor @ exact, (np.abs(factor) @ np.abs(exact)).max())


@shapes
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("divisor", [1.0, 3.0, 4.0])
def test_the_product_has_the_bits_of_the_torch_operations_and_the_rest_is_left(shape, rank, divisor):
    rows, columns = shape
    left, lines = factors(shape, rank)
    mine = lines + factors(shape, rank, seed=7)[1]
    matrix = random(rows * columns, seed=3)

    def rebuild():
        (whole, kept), (out_whole, out) = guarded(rows * columns), guarded(rows * columns)
        kept.copy_(matrix)
        top = native.rebuild(kept, left, mine, lines, divisor, out)
        assert untouched(whole, rows * columns)
        assert untouched(out_whole, rows * columns)
        return kept.clone(), out.clone(), top

    kept, out, top = at_every_level(rebuild)
    their_kept, their_out = matrix.clone(), torch.empty(rows * columns)
    assert top == reference.rebuild(their_kept, left, mine, lines, divisor, their_out)
    assert bits(out) == bits(their_out)
    assert torch.allclose(kept, their_kept, rtol=0, atol=2e-6 * float(matrix.abs().max()))
    exact = left.double().numpy() @ lines.double().numpy() / divisor
    assert close(out.view(shape), exact, np.abs(left.double().numpy()).max() * rank)
    rest = matrix.double().numpy().reshape(shape) - left.double().numpy() @ mine.double().numpy()
    assert close(kept.view(shape), rest, float(matrix.abs().max()) + rank)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 6, 132, 16 * 33 - 1, 17 * 33 - 1])
def test_what_is_not_finite_is_seen_by_the_pass_that_reads_it(bad, place):
    _, lines = factors((17, 33), 3)
    spoilt = random(17 * 33)
    spoilt[place] = bad
    for gradient, residual in ((spoilt, None), (random(17 * 33), spoilt)):
        for module in (native, reference):
            top = module.project(gradient, residual, torch.empty(17 * 33), lines, torch.empty(17, 3))
            assert top == float("inf")


def test_a_product_that_overflows_is_seen():
    left, lines = torch.full((4, 2), 1.0), torch.full((2, 9), 3e38)
    for divisor in (1.0, 4.0):
        for module in (native, reference):
            assert module.rebuild(torch.zeros(36), left, lines, lines, divisor, torch.empty(36)) == float("inf")


BASES = {
    "of one row": random(1, 1),
    "square": random(9, 9, seed=1),
    "tall": random(1000, 5, seed=2),
    "wide enough for three groups of four": random(300, 11, seed=3),
    "tiny": random(50, 4, seed=4) * 1e-40,
    "huge": random(50, 4, seed=5) * 1e37,
    "zeros": torch.zeros(20, 3),
    "negative zeros": torch.full((20, 3), -0.0),
    "dependent": random(40, 1, seed=6) @ torch.tensor([[1.0, 2.0, -0.5]]),
    "nearly dependent": random(40, 1, seed=7) @ torch.ones(1, 3) + 1e-6 * random(40, 3, seed=8),
    "sparse": random(64, 6, seed=9) * (torch.arange(64 * 6).view(64, 6) % 5 == 0),
}


@pytest.mark.parametrize("matrix", BASES.values(), ids=BASES)
def test_a_basis_has_the_bits_of_the_torch_operations(matrix):
    """On one rank there may be no compiler: its replica must stay the same."""
    (basis,) = at_every_level(lambda: (native.orthonormalise(matrix),))
    assert bits(basis) == bits(lowrank.orthonormalise(matrix))


def test_a_basis_of_columns_that_are_not_contiguous_is_the_same():
    matrix = random(4, 30, seed=1).t()
    assert bits(kernels.orthonormalise(matrix)) == bits(kernels.orthonormalise(matrix.contiguous()))


# What ScaleCom's leader picks, and DGC's momentum


@pytest.mark.parametrize("chunk", [1, 3, 8, 30, 64, 1000, 5000])
@pytest.mark.parametrize("numel", [1, 7, 64, 1000, 4099])
def test_the_largest_of_each_chunk_is_the_first_of_equals(numel, chunk):
    for values in (
        random(numel, seed=1),
        torch.zeros(numel),
        (torch.arange(numel) % 5).float() - 2,
        -torch.ones(numel),
    ):
        (found,) = at_every_level(lambda values=values: (native.chunk_largest(values, chunk),))
        assert torch.equal(found, reference.chunk_largest(values, chunk))
        assert found.numel() == -(-numel // chunk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 7, 33, 4099, 300_001])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum(numel, nesterov, dtype):
    gradient = random(numel, seed=1).to(dtype)
    for velocity in (None, random(numel, seed=2)):

        def momentum(velocity=velocity):
            whole, out = guarded(numel)
            native.momentum(gradient, velocity, 0.9, nesterov, out)
            assert untouched(whole, numel)
            return (out.clone(),)

        (found,) = at_every_level(momentum)
        theirs = torch.empty(numel)
        reference.momentum(gradient, velocity, 0.9, nesterov, theirs)
        assert bits(found) == bits(theirs)
        before = 0 if velocity is None else velocity.double().numpy()
        exact = gradient.double().numpy()
        exact = 0.9 * (before + exact) if nesterov else 0.9 * before + exact
        assert np.allclose(found.double().numpy(), exact, rtol=1e-6, atol=1e-6)
