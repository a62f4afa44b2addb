"""What goes wrong in training, and how it ends: on every back end, so and so often, counted.

A fault ends well in an error within 10 s that names its cause, on every rank or in what the job prints, or in exact
recovery: bits as those of a training without the fault. All else is a failure, and ends this with exit code 1.
FAULTS, BACKENDS, TIMES=3, OUT=rows.json; WRITE=1 puts the table into docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the launcher is that of the tests

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from mpi_tests.jobs.launch import Ended, command_of, start  # noqa: E402
from report import write_rows  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: make bench-faults WRITE=1 -->", "<!-- end of faults -->"
BACKENDS = {"horovod-mpi": "Horovod, MPI", "horovod-gloo": "Horovod, Gloo", "mpi4py": "mpi4py"}
SECONDS = 10.0  # for an error
RANKS = 2


@dataclass(frozen=True)
class Fault:
    """Of one function of faults_worker.py."""

    title: str
    error: tuple[str, ...] = ()  # what every rank's error has to say; none: exact recovery
    ends_job: bool = False  # the error is that of one rank, and the launcher has to end the others


FAULTS = {
    "killed": Fault("SIGKILL of a rank", error=("",), ends_job=True),
    "ended": Fault("an exception on one rank while the other posts", ("wrong with the data",), ends_job=True),
    "stopped": Fault("SIGSTOP of a rank for 20 s"),
    "wrong_options": Fault("another density on one rank", error=("density is 0.1 on rank 0 and 0.2 on rank 1",)),
    "wrong_shapes": Fault("another shape on one rank", error=("'a' (30, 20)", "'a' (30, 21)")),
    "nan_on_one_rank": Fault("NaN in a gradient of one rank, step skipped"),
    "inf_step": Fault("infinite gradient on one rank under a GradScaler"),
    "corrupt_frame_sent": Fault("a bit of a frame flipped on its way to all", error=("checksum", "from rank 1")),
    "corrupt_frame_received": Fault("a bit of a frame flipped on its way to one rank", ("checksum",), ends_job=True),
    "masks_that_differ": Fault("a mask updated a step early on one rank", error=("'a'",)),
    "schedule_that_differs": Fault("a schedule that differs at one step on one rank", error=("density is",)),
    "frozen_at_the_start": Fault("a layer frozen on one rank, at the start", error=("'c'",)),
    "frozen_later": Fault("a layer frozen on one rank, later", error=("'c'",)),
    "another_size": Fault("restart with two ranks from a checkpoint of three"),
    "disk_full_at_telemetry": Fault("disk full while telemetry is written", error=("File too large",)),
    "disk_full_at_plan_log": Fault("disk full while a plan is logged", error=("File too large",)),
}


def run(name: str, backend: str, times: int) -> dict[str, Any]:
    """The row of a fault on a back end; `how` tells of the first failure, if there is one."""
    fault = FAULTS[name]
    jobs = times if fault.ends_job else 1
    endings: list[tuple[bool, float, str]] = []
    for _ in range(jobs):
        with tempfile.TemporaryDirectory() as directory:
            worker = Path(__file__).with_name("faults_worker.py")
            command = command_of(backend, RANKS, worker, backend, name, str(times // jobs), directory)
            limit = 30 + (25 + SECONDS) * times // jobs
            ended = start(command).end(limit)
            endings += judged_job(fault, ended) if fault.ends_job else judged_times(fault, ended, directory, times)
    failures = [text for good, _, text in endings if not good]
    return {
        "fault": name,
        "title": fault.title,
        "backend": backend,
        "times": times,
        "good": times - len(failures),
        "outcome": "error" if fault.error else "exact recovery",
        "seconds": max((seconds for good, seconds, _ in endings if good), default=None),
        "how": failures[0] if failures else endings[0][2],
    }


def in_time(seconds: float) -> bool:
    """Of an idle machine."""
    return seconds < SECONDS


def judged_job(fault: Fault, ended: Ended) -> Iterator[tuple[bool, float, str]]:
    """Of a job that one rank's error has to end: whether it did so in time, named the cause and left nothing behind."""
    if "training starts at" not in ended.output or ended.code is None:
        yield False, 0.0, f"did not end, or did not begin: {ended.output[-300:]}"
        return
    seconds = ended.seconds_of_training()
    named = all(word in ended.output for word in fault.error)
    killed = fault.error != ("",) or "137" in f"{ended.code} {ended.output}"
    yield ended.code != 0 and named and killed and not ended.left_behind and in_time(seconds), seconds, "the job ends"


def judged_times(fault: Fault, ended: Ended, directory: str, times: int) -> Iterator[tuple[bool, float, str]]:
    """Of a job whose ranks tell how each time ended; what they did not come to is a failure."""
    files = [Path(directory, f"{rank}.jsonl") for rank in range(RANKS)]
    idle = ended.clock.seconds / max(ended.clock.elapsed, 1e-9)  # of each second that a rank has counted
    of_ranks = [[json.loads(line) for line in f.read_text().splitlines()] if f.exists() else [] for f in files]
    for number in range(times):
        rows = [rows[number] for rows in of_ranks if len(rows) > number]
        errors = [row["error"] or "" for row in rows]
        seconds = idle * max([row["seconds"] for row in rows], default=0.0)
        if len(rows) < RANKS:
            yield False, seconds, f"hangs, or ends on one rank only: {''.join(errors) or ended.output[-300:]}"
        elif not fault.error:
            yield all(row["exact"] for row in rows), seconds, "; ".join(errors)
        else:
            good = all(word in error for word in fault.error for error in errors) and in_time(seconds)
            yield good, seconds, errors[0] if len(set(errors)) == 1 else " | ".join(errors)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each fault, a column for each back end."""
    names = [name for name in BACKENDS if any(row["backend"] == name for row in rows)]
    lines = [f"| fault | ends in | {' | '.join(BACKENDS[name] for name in names)} |", "|---|---|" + "---|" * len(names)]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        of = {row["backend"]: row for row in rows if row["fault"] == fault}
        first = next(iter(of.values()))
        lines.append(f"| {first['title']} | {first['outcome']} | {' | '.join(cell(of.get(name)) for name in names)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    timed = f", {row['seconds']:.1f} s" if row["seconds"] is not None and row["outcome"] == "error" else ""
    return f"{row['good']} of {row['times']}{timed}"


def write_page(table: str) -> None:
    """Put the table between the page's marks."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def chosen(variable: str, known: Sequence[str]) -> list[str]:
    names = [name for name in os.environ.get(variable, "").split(",") if name] or list(known)
    if unknown := sorted({*names} - {*known}):
        sys.exit(f"{variable}: {', '.join(unknown)} is none of {', '.join(known)}")
    return names


def main() -> int:
    faults, backends = chosen("FAULTS", list(FAULTS)), chosen("BACKENDS", list(BACKENDS))
    times = int(os.environ.get("TIMES") or 3)
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows = []
    for name in faults:
        for backend in backends:
            rows.append(run(name, backend, times))
            row = rows[-1]
            failed = "" if row["good"] == times else f" FAILED: {row['how']}"
            console.print(f"{name}, {backend}: {cell(row)}{failed}", markup=False, soft_wrap=True)
            if os.environ.get("OUT"):
                write_rows(os.environ["OUT"], rows)
    table = Table(
        "fault", "ends in", *[BACKENDS[name] for name in backends], title=f"{RANKS} ranks, {times} times each"
    )
    for line in markdown(rows).splitlines()[2:]:
        table.add_row(*[text.strip() for text in line.strip("|").split(" | ")])
    console.print(table)
    if os.environ.get("WRITE"):
        write_page(markdown(rows))
    bad = sum(row["times"] - row["good"] for row in rows)
    console.print(
        f"{sum(row['good'] for row in rows)} of {sum(row['times'] for row in rows)} ended well, {bad} did not"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
