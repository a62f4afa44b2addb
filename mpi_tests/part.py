"""One process or job of the suite: runs it with live output, and tells how it ended."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SILENT_SECONDS = 600  # after which a part is taken to hang as a whole; a file of tests may be a single line
_END_SECONDS = 10  # for a part to end by itself, or when it is told to
_POLL_SECONDS = 0.02
_TAG = re.compile(rb"\[(?:[^\]\s]*,)?(\d+)\]<std(?:out|err)>: ?")  # Open MPI's and Horovod's
_COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
_OVERWRITTEN = re.compile(rb".*\r(?!\n)")  # by a rank that takes mpirun's pseudo-terminal for one
_FAILURE = re.compile(rb"^(?:FAILED|ERROR) +(\S.*)|^-* ?(rank .* failed in \w+) ?-*$")  # pytest's, and a rank's own
_CLOSING = re.compile(rb"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s")  # pytest's last line
_output = threading.Lock()


@dataclass
class Part:
    """One process or job of the suite, and how it ended."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    kind: str = ""  # parts of one kind run beside each other; none: alone
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)  # tests with the first line of the error, in the order printed
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    ending: str = "did not run"

    @property
    def good(self) -> bool:
        return self.ending == "ok"

    def run(self, prefix: str = "", stop: threading.Event | None = None) -> None:
        """Run it, with live output; where it runs beside another, of whole lines behind `prefix`. `stop` ends it."""
        _write(f"\n{f' {self.name} ':#^100}\n".encode())
        self.ending = "interrupted"
        started = time.monotonic()
        process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=_environment() | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        silent = False
        try:
            for chunk in _chunks(process, whole=bool(prefix), stop=stop):
                self._show(chunk, prefix)
            self._await_end(process)
        except TimeoutError:
            silent = True
        finally:
            _end(process)
        _write(b"\n")
        self.seconds = time.monotonic() - started
        if stop is None or not stop.is_set():
            self.ending = self._ending(process.returncode, silent)

    def _await_end(self, process: subprocess.Popen[bytes]) -> None:
        """Take the exit code and what the process and its children have used of the processors."""
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = used.ru_utime + used.ru_stime
                return
            time.sleep(_POLL_SECONDS)

    def _ending(self, code: int, silent: bool) -> str:
        if silent:
            return f"hung: silent for {_SILENT_SECONDS} s"
        if self.counts.keys() == {"deselected"}:
            return "ok"  # no test was selected, which Horovod's launcher takes for a failure
        if code or not self.counts:
            return "failed" if self.counts else f"died: exit code {code}"
        return "ok"

    def _show(self, line: bytes, prefix: str) -> None:
        if tag := _TAG.match(line):
            line = _TAG.sub(b"", line)  # torchrun marks each write, not each line
            if tag[1] != b"0":
                line = b"rank %s| %s" % (tag[1], line)
        line = _OVERWRITTEN.sub(b"", line)
        plain = _COLOUR.sub(b"", line)
        if failure := _FAILURE.match(plain.removeprefix(b"rank %s| " % tag[1]) if tag else plain):
            self.failures.append((failure[1] or failure[2]).decode(errors="replace").rstrip())
        # Only rank 0 ends with such a line.
        if closing := _CLOSING.match(plain):
            found = re.findall(r"(\d+) (\w+)", closing[1].decode())
            self.counts = {"errors" if kind == "error" else kind: int(count) for count, kind in found}
        _write(prefix.encode() + line)


def _write(text: bytes) -> None:
    with _output:
        sys.stdout.flush()
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


def _chunks(process: subprocess.Popen[bytes], *, whole: bool, stop: threading.Event | None) -> Iterator[bytes]:
    """Whole lines, or what there is of one. Raises TimeoutError when nothing comes for too long."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    pending = b""
    heard = time.monotonic()
    while stop is None or not stop.is_set():
        if not select.select([descriptor], [], [], 1.0)[0]:
            if time.monotonic() - heard > _SILENT_SECONDS:
                raise TimeoutError
            continue
        heard = time.monotonic()
        if not (data := os.read(descriptor, 1 << 16)):
            yield pending
            return
        *lines, pending = (pending + data).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if pending and not whole and not pending.startswith((b"[", b"=")):  # dots of a test file under way
            yield pending
            pending = b""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it if it still runs; the launchers forward SIGTERM to their ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)


def search_path() -> str:
    """With the launchers of this Python's environment before the system's."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _environment() -> dict[str, str]:
    """For many ranks on few cores: defaults that the caller's own variables override."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",  # for pytest to say of a failure what it was
        # Open MPI 5's names, then 4's.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_mpi_yield_when_idle": "1",  # several times faster where ranks outnumber cores
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${rank}]<stdout>: ",  # torchrun's
        "HOROVOD_CYCLE_TIME": "4",  # ms: at 1, ranks that outnumber cores spend these on asking each other for news
    }
    if os.getuid() == 0:  # Open MPI would refuse
        defaults |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = defaults | dict(os.environ) | {"PATH": search_path(), "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile the same files
    return environment
