"""Starts a script on several ranks the way a user would, and reports how it ended; leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent / "scripts"

HOROVOD = ("horovod-mpi", "horovod-gloo")
MPI4PY = ("mpi4py", "mpirun")  # with and without `python -m mpi4py`
LAUNCHERS = HOROVOD + MPI4PY

# The launchers of this Python's environment come before the system's.
_PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
_MARK = "HVD_COMPRESS_TESTS_JOB"  # in the environment of every process of a job
_TAG = re.compile(r"\[(?:[^\]\s]*,)?(\d+)\]<std(?:out|err)>: ?")  # what mpirun and horovodrun begin lines with
_LINGER_SECONDS = 5.0  # in which the ranks may end after their launcher did


@dataclass(frozen=True, repr=False)
class Ended:
    """How a job ended."""

    code: int | None  # of the launcher; None: it was killed at the time limit
    output: str
    seconds: float  # until all its processes were gone
    ended: float  # time.time() of that
    left_behind: list[str]  # command lines of processes that had to be killed after the launcher ended

    def of_rank(self, rank: int) -> str:
        """What one rank printed, without the launcher's tags."""
        tagged = ((_TAG.match(line), line) for line in self.output.splitlines())
        return "\n".join(line[tag.end() :] for tag, line in tagged if tag and int(tag[1]) == rank)

    def seconds_of_training(self) -> float:
        """From the moment at which the last rank said that it starts, by `backend.start`, to the end of the job."""
        started = [float(text) for text in re.findall(r"training starts at (\d+\.\d+)", self.output)]
        assert started, self
        return self.ended - max(started)

    def __repr__(self) -> str:
        after = f"\nleft behind: {self.left_behind}" if self.left_behind else ""
        return f"exit code {self.code} after {self.seconds:.1f} s{after}\n{self.output}"


class Job:
    """A job under way."""

    def __init__(self, command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> None:
        self._mark = uuid.uuid4().hex
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # no pipe: an orphan would keep its end open
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**environment, _MARK: self._mark},
            cwd=directory,
        )

    def output(self) -> str:
        """What the job has printed so far."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def await_output(self, pattern: str, seconds: float = 60.0) -> re.Match[str]:
        """Wait until the output matches. Raises AssertionError if the job ends before, or takes too long."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.output())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no {pattern!r} in the output of a job:\n{self.output()}")
            time.sleep(0.05)
        return found

    def end(self, timeout_seconds: float) -> Ended:
        """Wait for the end of all processes of the job; kill those that are late."""
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout_seconds)
            deadline = time.monotonic() + (0 if code is None else _LINGER_SECONDS)
            while self._alive() and time.monotonic() < deadline:
                time.sleep(0.05)
            seconds, ended, left_behind = time.monotonic() - self._started, time.time(), list(self._alive().values())
        finally:
            self._kill()
        output = self.output()
        self._log.close()
        return Ended(code, output, seconds, ended, left_behind)

    def _kill(self) -> None:
        while alive := self._alive():
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.05)
        self._process.wait()

    def _alive(self) -> dict[int, str]:
        """The command lines of the job's processes, by pid. Zombies have none."""
        mark = f"{_MARK}={self._mark}".encode()
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if command:
                        found[int(process.name)] = command
        return found


def start(command: Sequence[str | Path], directory: Path = ROOT, **environment: str) -> Job:
    """Start a command in `directory`, with an environment for many ranks on few cores."""
    defaults = {
        **os.environ,
        "PATH": _PATH,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        # Open MPI 5's names, then 4's.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${rank}]<stdout>: ",
    }
    if os.getuid() == 0:
        defaults |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # This process may itself be a rank of a job.
    foreign = ("PMIX_", "OMPI_COMM_", "PRTE_LAUNCHED", "HOROVOD_")
    inherited = {name: value for name, value in defaults.items() if not name.startswith(foreign)}
    return Job([str(part) for part in command], directory, inherited | environment)


def command_of(launcher: str, ranks: int, program: Path, *arguments: str) -> list[str]:
    """How `launcher` runs a Python program. Skips the test where it cannot."""
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--tee=3"]
        return [sys.executable, *torchrun, str(program), *arguments]
    _check_available(launcher)
    python = [sys.executable, "-u", "-W", "ignore"]
    if launcher == "mpi4py":
        python += ["-m", "mpi4py"]
    tail = [str(ranks), *python, str(program), *arguments]
    if launcher == "horovod-gloo":
        return [_beside("horovodrun"), "--gloo", "-H", f"localhost:{ranks}", "-np", *tail]
    return [_beside("mpirun"), "--tag-output", "-np", *tail]


def run_program(launcher: str, ranks: int, program: Path, *arguments: str, timeout_seconds: float, **env: str) -> Ended:
    """Run a Python program to its end."""
    return start(command_of(launcher, ranks, program, *arguments), **env).end(timeout_seconds * patience())


def run(launcher: str, ranks: int, script: str, *arguments: str, timeout_seconds: float = 30.0, **env: str) -> Ended:
    """Run scripts/`script` to its end; it is told the kind of its backend, then the arguments."""
    kind = "horovod" if launcher in HOROVOD else "mpi"
    return run_program(launcher, ranks, SCRIPTS / script, kind, *arguments, timeout_seconds=timeout_seconds, **env)


def no_control_codes(output: str) -> bool:
    """Whether it can be read in a file: no colours, no line that is written over another."""
    return "\x1b" not in output and "\r" not in output


def patience() -> float:
    """By how much longer than on an idle machine things may take here and now."""
    return min(max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), 3.0)


def _check_available(launcher: str) -> None:
    package, program = ("horovod", "horovodrun") if launcher in HOROVOD else ("mpi4py", "mpirun")
    if find_spec(package) is None or shutil.which(program, path=_PATH) is None:
        pytest.skip(f"{launcher} needs {package} and {program}")


def _beside(program: str) -> str:
    return shutil.which(program, path=_PATH) or program
