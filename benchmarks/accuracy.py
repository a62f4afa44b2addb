"""What every method costs in accuracy: the digits CNN and two character LMs, over seeds, against no compression.

Up to 4 ranks are real ones, of a job under Horovod and MPI; more are simulated in this process, whose gradients are
exchanged alike. Narrowed by the environment: TASKS=digits RANKS=2,4 METHODS=none,topk SEEDS=0,1,2; EPOCHS=8 trains
for longer, or less. OUT=FILE keeps the rows as JSON, with a plot beside it, and RESUME=1 goes on where the rows of FILE
end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy_methods import METHODS, TASKS, applies
from accuracy_report import BASELINE, markdown, plot, tables
from accuracy_runs import Combination, train_simulated
from rich.console import Console

from report import write_rows

ROOT = Path(__file__).resolve().parents[1]
RANKS, SEEDS = (2, 4, 8, 64), (0, 1, 2, 3, 4)
MOST_REAL_RANKS = 4

Row = dict[str, Any]
Report = Callable[[Row], None]


def chosen(name: str, known: Sequence[Any], *, open_ended: bool = False) -> list[Any]:
    """The values of the environment variable, of the type of the known ones; all of these if it is not set."""
    texts = os.environ.get(name, "").replace(",", " ").split()
    if not texts:
        return list(known)
    try:
        values = [type(known[0])(text) for text in texts]
    except ValueError:
        sys.exit(f"{name}={os.environ[name]}: must be whole numbers, such as {','.join(map(str, known))}")
    if unknown := [value for value in values if value not in known and not (open_ended and value >= 0)]:
        sys.exit(f"{name}: no such thing as {', '.join(map(str, unknown))} (choose from {', '.join(map(str, known))})")
    return values


def train_job(ranks: int, combinations: Sequence[Combination], report: Report) -> None:
    """All combinations in one job, to start it only once."""
    with tempfile.TemporaryDirectory() as directory:
        todo, lines = Path(directory, "combinations.json"), Path(directory, "rows.jsonl")
        todo.write_text(json.dumps(combinations))
        lines.touch()
        program = [sys.executable, "-m", "mpi4py", ROOT / "benchmarks" / "accuracy_runs.py", todo, lines]
        job = subprocess.Popen([ROOT / "scripts" / "mpirun", "-np", str(ranks), *program], stdout=subprocess.DEVNULL)
        try:
            with lines.open() as file:
                while True:
                    ended = job.poll() is not None
                    for line in file:
                        report(json.loads(line))
                    if ended:
                        break
                    time.sleep(0.5)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait()
        if job.returncode:
            sys.exit(f"the job of {ranks} ranks failed with exit code {job.returncode}")


def train_here(ranks: int, combinations: Sequence[Combination], report: Report) -> None:
    for combination in combinations:
        report(train_simulated(combination, ranks) | {"simulated": True})


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # end the job under way, too
    torch.set_num_threads(1)
    tasks, methods = chosen("TASKS", list(TASKS)), chosen("METHODS", list(METHODS))
    sizes, seeds = chosen("RANKS", RANKS, open_ended=True), chosen("SEEDS", SEEDS, open_ended=True)
    if min(sizes) < 2:
        sys.exit("RANKS: at least 2, as one rank has nothing to exchange")
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    if not re.fullmatch("[1-9][0-9]*|", os.environ.get("EPOCHS", "")):
        sys.exit(f"EPOCHS={os.environ['EPOCHS']}: must be one whole number, at least 1")
    rows: list[Row] = []
    if out and os.environ.get("RESUME", "0") not in ("", "0") and out.exists():
        rows = json.loads(out.read_text())
    done = {(row["task"], row["method"], row["ranks"], row["epochs"], row["seed"]) for row in rows}
    console = Console()

    def report(row: Row) -> None:
        rows.append(row)
        console.print({k: v for k, v in row.items() if k != "metric_name"}, soft_wrap=True)
        if out:  # after each training: a long benchmark that is ended keeps what it has
            write_rows(out, rows)

    for task in tasks:
        for ranks in sizes:
            epochs, simulated = TASKS[task].epochs_of(ranks), ranks > MOST_REAL_RANKS
            todo = [
                (task, m, seed)
                for m in methods
                for seed in seeds
                if applies(m, TASKS[task], simulated=simulated) and (task, m, ranks, epochs, seed) not in done
            ]
            if todo:
                (train_here if simulated else train_job)(ranks, todo, report)
    for table in tables(rows):
        console.print(table)
    if BASELINE not in {row["method"] for row in rows}:
        console.print(f"without METHODS={BASELINE} there is nothing to take differences to")
    if out:
        plot(rows, out.with_suffix(".png"))
        out.with_suffix(".md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
