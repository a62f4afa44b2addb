"""Starts a script on several ranks the way a user would, and reports how it ended; leaves no process behind."""

from __future__ import annotations

import bisect
import contextlib
import json
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
from typing import Any

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
_POLL_SECONDS = 0.05
_LEAST_SHARE = 0.25  # of a second that counts on the busiest machine: what spins for ever still comes to its limit


class IdleClock:
    """Seconds as an idle machine would need them: where more wants to run than there are cores, they count for less.

    It goes on while `tick` is called, often: each looks at what wants to run just then.
    """

    def __init__(self) -> None:
        self._ticks = [(time.time(), 0.0)]

    @property
    def seconds(self) -> float:
        return self._ticks[-1][1]

    @property
    def elapsed(self) -> float:
        """By the clock on the wall."""
        return self._ticks[-1][0] - self._ticks[0][0]

    def tick(self) -> float:
        """The seconds until now."""
        last, seconds = self._ticks[-1]
        running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1  # all but this thread
        share = min(1.0, (os.cpu_count() or 1) / max(running, 1))
        now = time.time()
        self._ticks.append((now, seconds + max(now - last, 0.0) * max(share, _LEAST_SHARE)))
        return self.seconds

    def at(self, moment: float) -> float:
        """The seconds until `moment`, a time.time()."""
        index = bisect.bisect(self._ticks, moment, key=lambda tick: tick[0])
        return self._ticks[max(index - 1, 0)][1]


@dataclass(frozen=True, repr=False)
class Ended:
    """How a job ended."""

    code: int | None  # of the launcher; None: it was killed at the time limit
    output: str
    clock: IdleClock  # until all its processes were gone
    left_behind: list[str]  # command lines of processes that had to be killed after the launcher ended

    def of_rank(self, rank: int) -> str:
        """What one rank printed, without the launcher's tags."""
        tagged = ((_TAG.match(line), line) for line in self.output.splitlines())
        return "\n".join(line[tag.end() :] for tag, line in tagged if tag and int(tag[1]) == rank)

    def seconds_of_training(self) -> float:
        """From the moment at which the last rank said that it starts, by `backend.start`, to the end of the job.

        Of an idle machine.
        """
        started = [float(text) for text in re.findall(r"training starts at (\d+\.\d+)", self.output)]
        assert started, self
        return self.clock.seconds - self.clock.at(max(started))

    def __repr__(self) -> str:
        after = f"\nleft behind: {self.left_behind}" if self.left_behind else ""
        seconds = f"{self.clock.elapsed:.1f} s, {self.clock.seconds:.1f} s of an idle machine"
        return f"exit code {self.code} after {seconds}{after}\n{self.output}"


class Job:
    """A job under way."""

    def __init__(self, command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> None:
        self._mark = uuid.uuid4().hex
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # no pipe: an orphan would keep its end open
        self._clock = IdleClock()
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
        """Wait until the output matches, for so many seconds of an idle machine.

        Raises AssertionError if the job ends before, or takes too long.
        """
        deadline = self._clock.tick() + seconds
        while not (found := re.search(pattern, self.output())):
            if self._process.poll() is not None or self._clock.tick() > deadline:
                raise AssertionError(f"no {pattern!r} in the output of a job:\n{self.output()}")
            time.sleep(_POLL_SECONDS)
        return found

    def end(self, timeout_seconds: float) -> Ended:
        """Wait for the end of all its processes, for so many seconds of an idle machine; kill those that are late."""
        try:
            deadline = self._clock.tick() + timeout_seconds
            while (code := self._process.poll()) is None and self._clock.tick() < deadline:
                time.sleep(_POLL_SECONDS)
            deadline = self._clock.tick() + (0 if code is None else _LINGER_SECONDS)
            while self._alive() and self._clock.tick() < deadline:
                time.sleep(_POLL_SECONDS)
            self._clock.tick()
            left_behind = list(self._alive().values())
        finally:
            self._kill()
        output = self.output()
        self._log.close()
        return Ended(code, output, self._clock, left_behind)

    def _kill(self) -> None:
        while alive := self._alive():
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(_POLL_SECONDS)
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
    return start(command_of(launcher, ranks, program, *arguments), **env).end(timeout_seconds)


def run(launcher: str, ranks: int, script: str, *arguments: str, timeout_seconds: float = 30.0, **env: str) -> Ended:
    """Run scripts/`script` to its end; it is told the kind of its backend, then the arguments."""
    kind = "horovod" if launcher in HOROVOD else "mpi"
    return run_program(launcher, ranks, SCRIPTS / script, kind, *arguments, timeout_seconds=timeout_seconds, **env)


def printed_json(output: str) -> Any:
    """What a command printed as JSON, among what a launcher says."""
    return json.loads(output[output.index("{") : output.rindex("}") + 1])


def no_control_codes(output: str) -> bool:
    """Whether it can be read in a file: no colours, no line that is written over another."""
    return "\x1b" not in output and "\r" not in output


def _check_available(launcher: str) -> None:
    package, program = ("horovod", "horovodrun") if launcher in HOROVOD else ("mpi4py", "mpirun")
    if find_spec(package) is None or shutil.which(program, path=_PATH) is None:
        pytest.skip(f"{launcher} needs {package} and {program}")


def _beside(program: str) -> str:
    return shutil.which(program, path=_PATH) or program
