"""Time the solver of rates: the C++ kernel against vectorised numpy, alternating in one run.

Prints the machine, the sizes, the medians and their ratio to that of numpy; --out writes them as a JSON list.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np

from hvd_compress import kernels
from hvd_compress.kernels import native, solver
from report import write_rows

Solver = Callable[[np.ndarray, np.ndarray, int], Optional[np.ndarray]]


def instance(layers: int, candidates: int, levels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Units and costs of layers whose sizes and errors differ; the middle candidate everywhere fills the budget."""
    generator = np.random.default_rng(seed)
    sizes = generator.lognormal(9, 1, (layers, 1))
    densities = np.linspace(0.01, 0.3, candidates)
    spread, decay = generator.lognormal(0, 0.3, (layers, 1)), generator.uniform(1, 8, (layers, 1))
    errors = np.sqrt(sizes) * spread * (1 - densities) ** decay
    units = np.ceil(errors / errors[:, candidates // 2].sum() * levels).astype(np.int32)
    return units, np.ceil(8 * sizes * densities)


def at_level(level: str) -> Solver | None:
    """The kernel compiled for `level`; None where this installation or processor lacks it."""
    if kernels.use(level) != level:
        return None

    def solve(units: np.ndarray, costs: np.ndarray, levels: int) -> np.ndarray | None:
        kernels.use(level)
        return native.solve_units(units, costs, levels)

    return solve


def compare(solvers: dict[str, Solver], layers: int, candidates: int, levels: int, runs: int) -> list[dict[str, Any]]:
    """One row per implementation; each run times all of them, one after another."""
    units, costs = instance(layers, candidates, levels, seed=0)
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    for run in range(runs + 1):
        choices = []
        for name, solve in solvers.items():
            start = time.perf_counter()
            choices.append(solve(units, costs, levels))
            if run:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
        if choices[0] is None or not all(np.array_equal(choice, choices[0]) for choice in choices):
            raise SystemExit("the implementations disagree")
    return [
        {
            "benchmark": "solver",
            "implementation": name,
            "layers": layers,
            "candidates": candidates,
            "levels": levels,
            "runs": runs,
            "median_seconds": statistics.median(taken),
            "minimum_seconds": min(taken),
            "machine": processor(),
        }
        for name, taken in seconds.items()
    ]


def processor() -> str:
    """The processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=600)
    parser.add_argument("--candidates", type=int, default=30)
    parser.add_argument("--levels", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, help="file for the rows, as JSON")
    options = parser.parse_args()
    compiled = {f"C++ {level}": at_level(level) for level in native.LEVELS}
    solvers = {"numpy": solver.solve_units} | {name: solve for name, solve in compiled.items() if solve}
    rows = compare(solvers, options.layers, options.candidates, options.levels, options.runs)
    print(f"{rows[0]['machine']}; {options.layers} layers, {options.candidates} candidates, {options.levels} levels")
    for row in rows:
        ratio = row["median_seconds"] / rows[0]["median_seconds"]
        print(f"{row['implementation']:10} median {row['median_seconds'] * 1e3:7.1f} ms, {ratio:.2f} of numpy")
    if options.out:
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
