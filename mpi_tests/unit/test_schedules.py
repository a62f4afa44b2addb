"""Rates over the steps, and how ranks tell whether theirs are the same."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest

from hvd_compress.schedules import ExponentialWarmup, Steps, density_at, describe, entries_of, value_at

VALUES = {"steps": Steps((0, 0.25), (100, 0.0625), (200, 0.01)), "warmup": ExponentialWarmup(interval=100)}


def test_a_number_is_its_own_schedule():
    assert [value_at(0.25, step) for step in (0, 1, 10**6)] == [0.25] * 3
    assert value_at(4, 7) == 4


def test_a_function_is_asked_for_its_step():
    assert [value_at(lambda step: 1 / (step + 1), step) for step in (0, 1, 3)] == [1, 0.5, 0.25]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_rate_that_is_not_finite_is_refused_with_its_step(value):
    with pytest.raises(ValueError, match="at step 3"):
        value_at(lambda step: value if step == 3 else 1.0, 3)


@pytest.mark.parametrize("density", [0, -0.1, 1.001, math.nan, lambda step: 0.0])
def test_a_density_that_is_none_is_refused(density):
    with pytest.raises(ValueError, match="step 2"):
        density_at(density, 2)


def test_steps_hold_until_the_next():
    schedule = Steps((0, 3), (10, 4), (11, 8.5))
    assert [schedule(step) for step in (0, 9, 10, 11, 10**9)] == [3, 3, 4, 8.5, 8.5]


@pytest.mark.parametrize(
    "levels", [(), ((1, 0.5),), ((0, 1), (5, 2), (5, 3)), ((0, 1), (5, 2), (4, 3)), ((0, math.nan),)]
)
def test_steps_that_make_no_schedule_are_refused(levels):
    with pytest.raises(ValueError, match="levels|finite"):
        Steps(*levels)


@pytest.mark.parametrize("total", [4, 5, 90, 1001])
def test_steps_share_evenly_to_within_one(total):
    schedule = Steps.evenly((3, 4, 6, 8), total)
    values = [schedule(step) for step in range(total)]
    assert values == sorted(values)
    counts = [values.count(bits) for bits in (3, 4, 6, 8)]
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1
    assert schedule(10 * total) == 8


def test_steps_need_one_step_a_value():
    with pytest.raises(ValueError, match="3 steps cannot be shared by 4 values"):
        Steps.evenly((3, 4, 6, 8), 3)


def test_the_warmup_is_the_papers():
    schedule = ExponentialWarmup(interval=7)
    sparsities = [75.0, 93.75, 98.4375, 99.609375, 99.9]  # per cent, in epochs 1 to 5
    for epoch, sparsity in enumerate(sparsities):
        assert all(100 * (1 - schedule(7 * epoch + step)) == pytest.approx(sparsity, abs=1e-9) for step in range(7))
    assert schedule(10**6) == 0.001


def test_the_warmup_reaches_other_ends_too():
    coefficient = 0.001 ** (1 / 6)  # of the authors' code, unlike their paper
    schedule = ExponentialWarmup(interval=1, factor=coefficient)
    expected = [0.31622776601683794, 0.1, 0.0316227766016838, 0.01, 0.00316227766016838, 0.001, 0.001]
    assert [schedule(step) for step in range(7)] == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"interval": 0}, {"final": 0}, {"final": 1.5}, {"factor": 1}, {"factor": 0}])
def test_a_warmup_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ExponentialWarmup(**({"interval": 10} | options))


@pytest.mark.parametrize("schedule", VALUES.values(), ids=VALUES)
def test_schedules_compare_hash_copy_and_print_by_value(schedule):
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)), eval(repr(schedule))):
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert describe(other) == describe(schedule) == repr(schedule)
    assert Steps((0, 0.25)) != Steps((0, 0.5))
    assert describe(Steps((0, 0.25))) != describe(Steps((0, 0.5)))


def linear(slope):
    return lambda step: 1 + slope * step


def halved(step, start):
    return start / 2**step if step < 1000 else start / 2**1000


def table(step):
    return [0.5, 0.25, 0.1, 0.1][step]


class Ramp:
    def __call__(self, step):
        return 1.0 + step


@pytest.mark.parametrize(
    "make",
    [lambda: linear(0.5), lambda: functools.partial(halved, start=1.0), Ramp, lambda: table, lambda: 0.25, lambda: 4],
    ids=["closure", "partial", "object", "table that ends", "float", "int"],
)
def test_equal_schedules_of_two_ranks_have_one_description(make):
    first, second = make(), make()
    assert describe(first) == describe(second)
    assert "0x" not in describe(first)


def test_different_functions_have_different_descriptions():
    rates = [linear(0.5), linear(0.25), Ramp(), table, lambda step: 1.0 if step < 500_000 else 2.0, lambda step: 1.0]
    assert len({describe(rate) for rate in rates}) == len(rates)


def test_entries_are_rounded_up_but_not_by_rounding_errors():
    assert [entries_of(density, 100) for density in (0.07, 0.071, 1e-9, 1.0)] == [7, 8, 1, 100]
    assert [entries_of(0.001, numel) for numel in (0, 1, 1000, 1001)] == [0, 1, 1, 2]
