"""Runs the suite: python -m mpi_tests [--sizes 1,2,4] [--backends mpi4py,...] [--only unit,ranks,jobs] [pytest args]

Tests of single processes, then those that run inside a job, once for every backend and number of ranks, then those
that start jobs of their own. Every line that a rank other than 0 prints is marked with its rank.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).resolve().parents[1]
_BIN = Path(sys.executable).parent
_BACKENDS = ("horovod-mpi", "horovod-gloo", "mpi4py")
_PARTS = ("unit", "ranks", "jobs")
_SILENT_SECONDS = 600  # after which a part is taken to hang as a whole; a file of tests may be a single line
_END_SECONDS = 10  # for a part to end by itself, or when it is told to
_TAG = re.compile(rb"\[(?:[^\]\s]*,)?(\d+)\]<std(?:out|err)>: ?")  # Open MPI's and Horovod's
_COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
_CLOSING = re.compile(rb"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s")  # pytest's last line
_KINDS = ("passed", "failed", "errors", "skipped")


@dataclass
class Part:
    """One process or job of the suite, and how it ended."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    ending: str = "did not run"

    @property
    def good(self) -> bool:
        return self.ending == "ok"

    def run(self) -> None:
        """Run it, with live output."""
        print(f"\n{f' {self.name} ':#^100}", flush=True)
        self.ending = "interrupted"
        started = time.monotonic()
        process = subprocess.Popen(
            self.command,
            cwd=_ROOT,
            env=_environment() | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        silent = False
        try:
            for chunk in _chunks(process):
                self._show(chunk)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
        except TimeoutError:
            silent = True
        finally:
            _end(process)
        print(flush=True)
        self.seconds = time.monotonic() - started
        if silent:
            self.ending = f"hung: silent for {_SILENT_SECONDS} s"
        elif self.counts.keys() == {"deselected"}:
            self.ending = "ok"  # no test was selected, which Horovod's launcher takes for a failure
        elif process.returncode or not self.counts:
            self.ending = "failed" if self.counts else f"died: exit code {process.returncode}"
        else:
            self.ending = "ok"

    def _show(self, line: bytes) -> None:
        if tag := _TAG.match(line):
            line = line[tag.end() :]
            if tag[1] != b"0":
                line = b"rank %s| %s" % (tag[1], line)
        # Only rank 0 ends with such a line.
        if closing := _CLOSING.match(_COLOUR.sub(b"", line)):
            found = re.findall(r"(\d+) (\w+)", closing[1].decode())
            self.counts = {"errors" if kind == "error" else kind: int(count) for count, kind in found}
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def _chunks(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Whole lines, or what there is of one. Raises TimeoutError when nothing comes for too long."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    pending = b""
    while select.select([descriptor], [], [], _SILENT_SECONDS)[0]:
        if not (data := os.read(descriptor, 1 << 16)):
            yield pending
            return
        *lines, pending = (pending + data).split(b"\n")
        yield from (line + b"\n" for line in lines)
        if pending and not pending.startswith((b"[", b"=")):  # dots of a test file under way
            yield pending
            pending = b""
    raise TimeoutError


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it if it still runs; the launchers forward SIGTERM to their ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)


def _environment() -> dict[str, str]:
    """For many ranks on few cores: defaults that the caller's own variables override."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        # Open MPI 5's names, then 4's.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_mpi_yield_when_idle": "1",  # several times faster where ranks outnumber cores
    }
    if os.getuid() == 0:  # Open MPI would refuse
        defaults |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return defaults | dict(os.environ) | {"PATH": _path(), "PYTHONUNBUFFERED": "1"}


def _path() -> str:
    """With the launchers of this Python's environment before the system's."""
    return f"{_BIN}{os.pathsep}{os.environ['PATH']}"


def _pytest(paths: Sequence[str], arguments: list[str]) -> list[str]:
    return ["-m", "pytest", f"--color={'yes' if sys.stdout.isatty() else 'no'}", *arguments, *paths]


def _once(directory: str, arguments: list[str]) -> Part:
    return Part(directory, [sys.executable, *_pytest([f"mpi_tests/{directory}"], arguments)])


def _jobs(backend: str, size: int, arguments: list[str]) -> Iterator[Part]:
    """One job; several on Gloo with more than two ranks, where Horovod hung or crashed late in a job of all tests."""
    paths = sorted(str(path.relative_to(_ROOT)) for path in (_ROOT / "mpi_tests" / "ranks").glob("test_*.py"))
    count = 4 if backend == "horovod-gloo" and size > 2 else 1
    for number in range(count):
        name = f"{backend}, {size}" + (f", {number + 1} of {count}" if count > 1 else "")
        yield _job(backend, size, arguments, paths[number::count], name)


def _job(backend: str, size: int, arguments: list[str], paths: Sequence[str], name: str, **environment: str) -> Part:
    """Ranks' tests as one job. The first failure ends it: what a failed test leaves behind differs by rank."""
    horovodrun, mpirun = (shutil.which(name, path=_path()) or name for name in ("horovodrun", "mpirun"))
    launcher = [mpirun, "--tag-output", "-n", str(size), sys.executable]
    if backend == "horovod-gloo":
        launcher = [horovodrun, "--gloo", "-np", str(size), "-H", f"localhost:{size}", sys.executable]
    if backend == "mpi4py":
        launcher += ["-m", "mpi4py"]  # so that an exception aborts the job
    options = ["-x", "-p", "no:cacheprovider"]
    extra = "".join(f" {variable}={value}" for variable, value in environment.items())
    return Part(
        f"ranks: {name}{extra}",
        [*launcher, *_pytest(paths, [*options, *arguments])],
        {"HVD_COMPRESS_BACKEND": backend, **environment},
    )


def _parts(options: argparse.Namespace, arguments: list[str]) -> Iterator[Part]:
    if "unit" in options.only:
        yield _once("unit", arguments)
    if "ranks" in options.only:
        for backend in options.backends:
            for size in options.sizes:
                yield from _jobs(backend, size, arguments)
        if "mpi4py" in options.backends and 2 in options.sizes:
            level = {"MPI4PY_RC_THREAD_LEVEL": "serialized"}
            yield _job("mpi4py", 2, arguments, ["mpi_tests/ranks"], "mpi4py, 2", **level)
    if "jobs" in options.only:
        yield _once("jobs", arguments)


def _summarize(parts: list[Part]) -> None:
    table = Table("part", *_KINDS, "seconds", "", title="all parts")
    for part in parts:
        counts = [str(part.counts.get(kind, "")) for kind in _KINDS]
        colour = "green" if part.good else "red"
        table.add_row(part.name, *counts, f"{part.seconds:.1f}", f"[{colour}]{part.ending}[/]")
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    totals = {kind: sum(part.counts.get(kind, 0) for part in parts) for kind in _KINDS}
    bad = [part.name for part in parts if not part.good]
    if bad:
        print(f"not ok: {'; '.join(bad)}")
    counted = ", ".join(f"{count} {kind}" for kind, count in totals.items() if count) or "no tests ran"
    print(f"{counted} in {sum(part.seconds for part in parts):.2f}s, {len(parts) - len(bad)} of {len(parts)} parts ok")


def _choice(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(allowed)}")
        return chosen

    return parse


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpi_tests", description="Other arguments go to pytest.", allow_abbrev=False
    )
    parser.add_argument("--sizes", type=_sizes, default=[1, 2, 4], help="numbers of ranks; default 1,2,4")
    parser.add_argument(
        "--backends", type=_choice(_BACKENDS), default=list(_BACKENDS), help=f"some of {','.join(_BACKENDS)}"
    )
    parser.add_argument("--only", type=_choice(_PARTS), default=list(_PARTS), help=f"some of {','.join(_PARTS)}")
    options, arguments = parser.parse_known_args()
    parts = list(_parts(options, arguments))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the part under way
    try:
        for part in parts:
            part.run()
    finally:
        _summarize(parts)
    return 0 if all(part.good for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
