"""The accuracy benchmark: its statistics, and that what it spares simulated ranks changes nothing."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("rich")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import accuracy_runs
from accuracy_report import half_width, markdown, summarize


def rows_of(method, metrics, **more):
    fixed = {"task": "digits", "ranks": 2, "epochs": 1, "metric_name": "accuracy", "bytes_per_rank_per_step": 100.0}
    fixed |= more
    return [{**fixed, "method": method, "seed": seed, "metric": metric} for seed, metric in metrics.items()]


def test_the_interval_is_that_of_students_t():
    # Of 1, 2, 3, 4, 5: s / sqrt(5) = sqrt(2.5 / 5), and t of 4 degrees of freedom at 97.5 % is 2.7764451.
    assert half_width([1, 2, 3, 4, 5]) == pytest.approx(2.7764451 * math.sqrt(0.5))
    assert math.isnan(half_width([1.0]))


def test_differences_are_paired_by_seed_whatever_the_order():
    rows = rows_of("none", {0: 90.0, 1: 80.0, 2: 70.0}) + rows_of("topk", {2: 71.0, 1: 81.0, 0: 91.0, 7: 10.0})
    none, topk = summarize(rows)
    assert (none.mean, none.difference, none.half_width) == (80.0, 0.0, 0.0)
    assert (topk.seeds, topk.difference, topk.half_width) == (4, pytest.approx(1.0), pytest.approx(0.0))
    assert topk.mean == pytest.approx(63.25)
    assert "+1.00 ± 0.00" in markdown(rows)


def test_a_dense_twin_is_a_line_of_its_own_and_places_are_apart():
    rows = (
        rows_of("none", {0: 90.0}) + rows_of("none", {0: 50.0}, ranks=8) + rows_of("none", {0: 70.0}, ranks=8, epochs=2)
    )
    rows += rows_of("acdc", {0: 89.0}, dense_twin_metric=92.0, ranks=8)
    found = {(s.ranks, s.method): s.difference for s in summarize(rows) if s.method != "none"}
    assert found == {(8, "acdc"): 39.0, (8, "acdc, dense twin"): 42.0}


@pytest.mark.parametrize("method", ["terngrad", "topk", "dgc", "lgreco", "scalecom", "acdc"])
def test_frames_that_only_rank_0_decodes_change_nothing(method, monkeypatch):
    task = accuracy_runs.TASKS["digits"]
    monkeypatch.setitem(accuracy_runs.TASKS, "digits", dataclasses.replace(task, epochs=1, score=digest))
    sparing = accuracy_runs.train_simulated(("digits", method, 0), 3)
    everyone = accuracy_runs.LocalRanks
    monkeypatch.setattr(accuracy_runs, "LocalRanks", lambda compressions, readers: everyone(compressions))
    usual = accuracy_runs.train_simulated(("digits", method, 0), 3)
    for what in ("metric", "bytes_per_rank_per_step", "steps"):
        assert sparing[what] == usual[what]


def digest(model, _):
    """All weights in one number."""
    return sum(
        float((p.detach() * torch.arange(p.numel()).view(p.shape)).sum(dtype=torch.float64)) for p in model.parameters()
    )
