"""The choice of rates: exact against brute force, the same from C++ and numpy, never worse than the reference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hvd_compress import kernels
from hvd_compress.adaptive import TimeCost, bytes_cost, solve
from hvd_compress.kernels import native
from hvd_compress.kernels import solver as reference

LEVELS = [level for level in ("torch", *native.LEVELS) if kernels.use(level) == level]

# Worked out by hand: rows + columns times the approximation rank, for ranks 2, 4 and 8.
COSTS = np.outer([128, 512, 1024], [2, 4, 8])
ERRORS = np.array([[0.60, 0.40, 0.20], [0.50, 0.42, 0.36], [0.90, 0.80, 0.70]])


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    before = kernels.in_use()
    kernels.use(request.param)
    yield request.param
    kernels.use(before)


def solve_units(level, units, costs, levels):
    return (reference if level == "torch" else native).solve_units(units, costs, levels)


def brute_force(units, costs, levels):
    """As promised: least cost, then fewest units, then the lower candidate in the last layer that differs."""
    best = None
    for choice in itertools.product(range(units.shape[1]), repeat=len(units)):
        taken = [units[layer, candidate] for layer, candidate in enumerate(choice)]
        if min(taken, default=0) >= 0 and sum(taken) <= levels:
            cost = 0.0
            for layer, candidate in enumerate(choice):
                cost += costs[layer, candidate]
            key = cost, sum(taken), choice[::-1]
            best = key if best is None else min(best, key)
    return None if best is None else list(best[2][::-1])


def small_instance(generator):
    layers, candidates = generator.integers(1, 5), generator.integers(1, 5)
    units = generator.integers(-1, generator.integers(2, 12), (layers, candidates)).astype(np.int32)
    # Few different costs, so that many choices are equally good.
    costs = generator.integers(0, generator.integers(2, 40), (layers, candidates)).astype(np.float64)
    return units, costs, int(generator.integers(1, 25))


def test_it_finds_what_trying_everything_finds(level):
    generator = np.random.default_rng(1)
    found = []
    for _ in range(2500):
        units, costs, levels = small_instance(generator)
        choice = solve_units(level, units, costs, levels)
        assert (None if choice is None else choice.tolist()) == brute_force(units, costs, levels)
        found.append(choice is not None)
    assert 500 < sum(found) < 2400  # both kinds


@pytest.mark.parametrize(("layers", "candidates", "levels"), [(1, 1, 1), (7, 3, 15), (40, 9, 1000), (90, 12, 4097)])
def test_the_kernels_choose_as_numpy_does(level, layers, candidates, levels):
    generator = np.random.default_rng(layers)
    for _ in range(5):
        units = generator.integers(-1, 3 * levels // layers + 2, (layers, candidates)).astype(np.int32)
        units[:, 0] = levels // layers
        costs = generator.choice([generator.random(units.shape) * 1e6, np.round(generator.random(units.shape) * 3)])
        expected = reference.solve_units(units, costs, levels)
        assert expected is not None
        assert solve_units(level, units, costs, levels).tolist() == expected.tolist()


def test_no_choice_fits(level):
    assert solve_units(level, np.array([[-1, -1]], np.int32), np.ones((1, 2)), 5) is None
    assert solve_units(level, np.array([[3], [3]], np.int32), np.ones((2, 1)), 5) is None
    assert solve_units(level, np.empty((0, 3), np.int32), np.empty((0, 3)), 5).tolist() == []


def test_three_layers_worked_out_by_hand():
    plan = solve(ERRORS, COSTS, reference=[1, 1, 1])
    assert (plan.choice, plan.cost, plan.reference_cost) == ((2, 0, 0), 4096, 6656)
    assert math.isclose(plan.error, 1.60)
    assert math.isclose(plan.budget, 1.62)
    assert not plan.fell_back


def test_coarse_levels_never_cost_more_than_the_reference():
    # With ten levels the programme by itself finds 8, 4, 4, of size 7168.
    plan = solve(ERRORS, COSTS, reference=[1, 1, 1], levels=10)
    assert plan.cost <= 6656
    assert plan.error <= plan.budget


def test_multiples_of_a_level_are_solved_exactly():
    generator = np.random.default_rng(2)
    for _ in range(300):
        layers, candidates = generator.integers(1, 5), generator.integers(2, 5)
        errors = generator.integers(0, 9, (layers, candidates)).astype(float)
        costs = generator.integers(0, 50, (layers, candidates)).astype(float)
        middle = np.full(layers, candidates // 2)
        total = int(errors[:, candidates // 2].sum())
        plan = solve(errors, costs, reference=middle, levels=max(total, 1))
        best = brute_force(errors.astype(np.int32), costs, total)
        assert plan.cost == sum(costs[layer, candidate] for layer, candidate in enumerate(best))


def test_the_plan_is_never_worse_than_the_reference():
    generator = np.random.default_rng(3)
    for _ in range(400):
        shape = generator.integers(1, 30), generator.integers(1, 8)
        errors, costs = generator.lognormal(0, 3, shape), generator.lognormal(0, 3, shape)
        errors[generator.random(shape) < 0.1] = generator.choice([math.inf, math.nan, 0])
        costs[generator.random(shape) < 0.1] = generator.choice([math.inf, math.nan])
        middle = np.full(shape[0], shape[1] // 2)
        costs[:, shape[1] // 2] = generator.lognormal(0, 3, shape[0])
        plan = solve(errors, costs, reference=middle, levels=int(generator.choice([3, 100, 10_000])))
        assert plan.cost <= plan.reference_cost
        assert plan.error <= plan.budget
        taken = costs[np.arange(shape[0]), list(plan.choice)]
        assert np.isfinite(taken).all()


def test_a_layer_without_an_error_of_its_reference_keeps_it():
    errors = [[math.nan] * 3, [4, 2, 1], [math.inf] * 3]
    plan = solve(errors, [[1, 2, 3]] * 3, reference=[1, 1, 1])
    assert plan.choice == (1, 1, 1)
    assert plan.budget == 2


def test_a_layer_without_error_takes_the_cheapest():
    assert solve([[0, 0, 0], [4, 2, 1]], [[1, 2, 3]] * 2, reference=[2, 1]).choice == (0, 1)
    assert solve(np.zeros((3, 2)), [[1, 2]] * 3, reference=[1, 1, 1]).choice == (0, 0, 0)


def test_a_larger_budget_costs_less():
    costs = [solve(ERRORS, COSTS, reference=[1, 1, 1], alpha=alpha).cost for alpha in (0.5, 1.0, 1.2, 2.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == COSTS[:, 0].sum()
    assert solve(ERRORS, COSTS, reference=[1, 1, 1], alpha=0.1).choice == (1, 1, 1)  # nothing fits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"levels": 0}, "levels"),
        ({"reference": [1, 1]}, r"\[layers\]"),
        ({"reference": [1, 1, 3]}, "layer 2"),
        ({"reference": [1.0, 1.0, 1.0]}, "integers"),
        ({"errors": -ERRORS}, "at least 0"),
        ({"costs": np.where(COSTS == 512 * 4, math.inf, COSTS)}, "layer 1 cannot take its reference"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    arguments = {"errors": ERRORS, "costs": COSTS, "reference": [1, 1, 1]} | change
    with pytest.raises(ValueError, match=message):
        solve(arguments.pop("errors"), arguments.pop("costs"), **arguments)


def test_a_link_is_fitted_in_spite_of_stalls():
    samples = [(size, 2e-4 + size / 1e8) for size in (1000, 10_000, 100_000, 1_000_000) for _ in range(5)]
    samples[3] = samples[3][0], 0.5
    link = TimeCost.fit(samples)
    assert math.isclose(link.latency_seconds, 2e-4, rel_tol=1e-3)
    assert math.isclose(link.bandwidth_bytes_per_second, 1e8, rel_tol=1e-3)
    assert math.isclose(float(link(500_000, messages=2)), 4e-4 + 5e-3, rel_tol=1e-3)


def test_a_link_without_a_slope_is_infinitely_fast():
    assert TimeCost.fit([(1, 0.1), (1000, 0.1)]).bandwidth_bytes_per_second == math.inf
    with pytest.raises(ValueError, match="one size"):
        TimeCost.fit([(8, 0.1), (8, 0.2)])
    with pytest.raises(ValueError, match="positive"):
        TimeCost.fit([(8, 0.1), (9, -0.2)])


def test_costs_mark_what_a_layer_cannot_take():
    assert np.isinf(bytes_cost([1, math.inf])).tolist() == [False, True]
    assert np.isinf(TimeCost(0, math.inf)([1, math.inf])).tolist() == [False, True]
    with pytest.raises(ValueError, match="at least 0"):
        bytes_cost([-1.0])
