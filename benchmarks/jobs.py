"""Starts the benchmarks' jobs of several ranks, ends them whatever happens, and brings back their rows."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from turns import Job, take

from report import read_rows

Launcher = Callable[[Sequence[str], Mapping[str, str]], list[str]]
"""Makes, of a program and the variables that its ranks need, the command that starts it."""

# Of every rank. Horovod's settings are its defaults but for the cache, which has to hold the names of all methods.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HOROVOD_CACHE_CAPACITY": "8192",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # a rank that waits leaves its core to the others
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
}


def prepare() -> None:
    """Find this Python's mpirun first, let root use it, and leave nothing behind when this process is ended."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if os.geteuid() == 0:
        os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def rows_of(program: Sequence[str], launcher: Launcher) -> list[dict[str, Any]]:
    """What the ranks of a job have measured: `program` gets --out FILE, where rank 0 writes it.

    Raises RuntimeError if the job fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "rows.json")
        _run(launcher([sys.executable, *program, "--out", str(out)], ENVIRONMENT))
        return read_rows(out)


def rows_in_turns(programs: Sequence[Sequence[str]], launcher: Launcher, ranks: int) -> list[dict[str, Any]]:
    """As `rows_of`, of jobs of so many ranks that take turns: each gets --turns DIRECTORY, too."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as running:
        outs, waiting, processes = [], [], []
        for number, program in enumerate(programs):
            turns = Path(directory, str(number))
            turns.mkdir()
            outs.append(turns / "rows.json")
            command = [sys.executable, *program, "--out", str(outs[-1]), "--turns", str(turns)]
            process = running.enter_context(_started(launcher(command, ENVIRONMENT)))
            waiting.append(Job(turns, ranks, lambda process=process: process.poll() is not None))
            running.callback(waiting[-1].release)
            processes.append(process)
        take(waiting)
        for process in processes:
            _check(process.wait())
        return [row for out in outs for row in read_rows(out)]


def told(program: Sequence[str], launcher: Launcher) -> Any:
    """The JSON that rank 0 of a job prints, whatever its exit code. Raises RuntimeError if that is none."""
    command = launcher([sys.executable, *program], ENVIRONMENT)
    ended = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, capture_output=True)
    try:
        return json.loads(ended.stdout)
    except ValueError as error:
        said = ended.stderr.decode(errors="replace")
        raise RuntimeError(f"{' '.join(program)} failed with exit code {ended.returncode}:\n{said}") from error


def _run(command: Sequence[str]) -> None:
    with _started(command) as process:
        _check(process.wait())


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"the job failed with exit code {code}: see above")


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, which is ended if it has not."""
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    process.wait(5)


def on_this_machine(count: int, *options: str) -> Launcher:
    """`count` ranks here, more than cores if need be."""
    mapping = ["--bind-to", "none", "--map-by", ":oversubscribe"]
    return lambda program, environment: ["mpirun", *mapping, *options, "-np", str(count), *program]
