"""Runs the suite: python -m mpi_tests [--sizes 1,2,4] [--backends mpi4py,...] [--only unit,ranks,jobs] [pytest args]

Tests of single processes, then those that run inside a job, once for every backend and number of ranks, then those
that start jobs of their own. Parts that leave a core idle run beside each other. Every line that a rank other than 0
prints is marked with its rank.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from .part import ROOT, Part, search_path
from .summary import summarize, summarize_runs

_BACKENDS = ("horovod-mpi", "horovod-gloo", "mpi4py", "torch")
_PARTS = ("unit", "ranks", "jobs")
# Parts that run beside each other, by what they are: processes, jobs of two ranks or of four, tests that start jobs.
# Kinds follow one another: three lanes of mixed kinds were no faster, and unit tests beside ranks took twice as long.
_LANES = {"processes": 2, "pairs": 3, "fours": 2, "jobs": 2}
# Of the tests that start jobs; all others are a third part, which takes longest.
_JOBS = (
    ("test_benchmarks", "test_ddp", "test_documents"),
    ("test_elastic", "test_runner", "test_wheel"),
)


def _pytest(paths: Sequence[str], arguments: list[str]) -> list[str]:
    return ["-m", "pytest", f"--color={'yes' if sys.stdout.isatty() else 'no'}", *arguments, *paths]


def _unit(arguments: list[str]) -> Iterator[Part]:
    """Every second test in each; conftest.py takes its share."""
    shares = _LANES["processes"]
    for number in range(1, shares + 1):
        share = {"HVD_COMPRESS_TEST_SHARE": f"{number}/{shares}"}
        command = [sys.executable, *_pytest(["mpi_tests/unit"], ["-p", "no:cacheprovider", *arguments])]
        yield Part(f"unit, {number} of {shares}", command, share, kind="processes")


def _ranks(backend: str, size: int, arguments: list[str], **environment: str) -> Part:
    """Ranks' tests as one job. The first failure ends it: what a failed test leaves behind differs by rank."""
    horovodrun, mpirun = (shutil.which(name, path=search_path()) or name for name in ("horovodrun", "mpirun"))
    launcher = [mpirun, "--tag-output", "-n", str(size), sys.executable]
    if backend == "horovod-gloo":
        launcher = [horovodrun, "--gloo", "-np", str(size), "-H", f"localhost:{size}", sys.executable]
    if backend == "mpi4py":
        launcher += ["-m", "mpi4py"]  # so that an exception aborts the job
    if backend == "torch":  # with tags as mpirun's, by the environment that part.py gives
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={size}",
            "--tee=3",
        ]
    options = ["-x", "-p", "no:cacheprovider"]
    extra = "".join(f" {variable}={value}" for variable, value in environment.items())
    return Part(
        f"ranks: {backend}, {size}{extra}",
        [*launcher, *_pytest(["mpi_tests/ranks"], [*options, *arguments])],
        {"HVD_COMPRESS_BACKEND": backend, **environment},
        kind={1: "processes", 2: "pairs", 4: "fours"}.get(size, ""),
    )


def _jobs(arguments: list[str]) -> Iterator[Part]:
    """Tests that start jobs of their own, and mostly wait for them."""
    names = {path.stem for path in (ROOT / "mpi_tests" / "jobs").glob("test_*.py")}
    parts = [sorted(names.difference(*_JOBS)), *_JOBS]
    for number, part in enumerate(parts, start=1):
        paths = [f"mpi_tests/jobs/{name}.py" for name in part]
        command = [sys.executable, *_pytest(paths, arguments)]
        yield Part(f"jobs, {number} of {len(parts)}", command, kind="jobs")


def _parts(options: argparse.Namespace, arguments: list[str]) -> Iterator[Part]:
    """Those of one process first."""
    arguments = ["-m", "long" if options.long else "not long", *arguments]
    if "unit" in options.only:
        yield from _unit(arguments)
    if "ranks" in options.only:
        alone = options.backends == ["torch"]  # as of `make test-ddp`; beside the others at two ranks only
        jobs = [(size, backend) for size in options.sizes for backend in options.backends]
        jobs = [(size, backend) for size, backend in jobs if alone or backend != "torch" or size == 2]
        yield from (_ranks(backend, size, arguments) for size, backend in sorted(jobs, key=lambda job: job[0] > 1))
        if "mpi4py" in options.backends and 2 in options.sizes:
            yield _ranks("mpi4py", 2, arguments, MPI4PY_RC_THREAD_LEVEL="serialized")
    if "jobs" in options.only:
        yield from _jobs(arguments)


def _run(parts: Sequence[Part]) -> None:
    """One after the other, but those of one kind together."""
    for part in parts:
        if part.ending != "did not run":
            continue
        together = [other for other in parts if other.kind and other.kind == part.kind]
        if len(together) > 1 and (os.cpu_count() or 1) > 1:
            _run_beside(together)
        else:
            part.run()


def _run_beside(parts: Sequence[Part]) -> None:
    waiting = iter(parts)
    taking, stop = threading.Lock(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with taking:
                part = next(waiting, None)
            if part is None:
                return
            part.run(f"{part.name}| ", stop)

    lanes = [threading.Thread(target=work) for _ in range(_LANES[parts[0].kind])]
    for lane in lanes:
        lane.start()
    try:
        for lane in lanes:
            lane.join()
    finally:
        stop.set()
        for lane in lanes:
            lane.join()


def _choice(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(allowed)}")
        return chosen

    return parse


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def _times(text: str) -> int:
    if (times := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: {text}")
    return times


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpi_tests", description="Other arguments go to pytest.", allow_abbrev=False
    )
    parser.add_argument("--sizes", type=_sizes, default=[1, 2, 4], help="numbers of ranks; default 1,2,4")
    parser.add_argument(
        "--backends", type=_choice(_BACKENDS), default=list(_BACKENDS), help=f"some of {','.join(_BACKENDS)}"
    )
    parser.add_argument("--only", type=_choice(_PARTS), default=list(_PARTS), help=f"some of {','.join(_PARTS)}")
    parser.add_argument("--part", default="", help="only parts whose names, as the table has them, contain this")
    parser.add_argument(
        "--repeat", type=_times, default=1, metavar="TIMES", help="run all that so often; count failures"
    )
    parser.add_argument("--long", action="store_true", help="the slow studies instead")
    return parser


def main() -> int:
    parser = _parser()
    options, arguments = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the part under way
    runs: list[list[Part]] = []
    seconds: list[float] = []
    for _ in range(options.repeat):
        parts = [part for part in _parts(options, arguments) if options.part in part.name]
        if not parts:
            names = "; ".join(part.name for part in _parts(options, arguments))
            parser.error(f"no part's name contains {options.part!r}. Parts: {names}")
        runs.append(parts)
        started = time.monotonic()
        try:
            _run(parts)
        finally:
            seconds.append(time.monotonic() - started)
            summarize(parts, seconds[-1])
            if options.repeat > 1:
                summarize_runs(runs, seconds)
    return 0 if all(part.good for parts in runs for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
