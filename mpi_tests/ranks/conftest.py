"""Runs each test on all ranks in step, so that they pass, fail and end together.

After a test's call and its teardown the ranks tell each other how it went; if it failed on one it fails on all. So
does a test after which an operation is posted on some ranks only. A rank that fails while others wait for it in a
collective cannot tell them: after a short grace it has them print their stacks and exits, and the launcher ends the
job. A test that hangs everywhere prints all stacks, and an alarm ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from .job import Job, join
from .left_over import left_over
from .rendezvous import Rendezvous

_STACKS_SECONDS = int(os.environ.get("HVD_COMPRESS_TEST_SECONDS", 30))  # of a test, until all ranks print their stacks
_TEST_SECONDS = _STACKS_SECONDS + 3  # until it is ended
_ENDS_SECONDS = 60  # to start the job, and to end it
_GRACE_SECONDS = 4.0
_LEFT_OVER_SECONDS = 5.0  # at the end of a test, for what all ranks have posted to end
_PRINT_SECONDS = 0.5
_REARM_SECONDS = 5.0  # the timer of the stacks is a thread, which takes longer to start anew than most tests

_job: Job
_rendezvous: Rendezvous
_pids: list[int]  # by rank; all are on this host
_stderr: int
_armed = -_REARM_SECONDS

# Of what a test needs of its job; where it lacks that, the test is left out.
_NEEDS: dict[str, Callable[[Job], bool]] = {
    "several": lambda job: job.size > 1,
    "horovod": lambda job: job.is_horovod,
    "plain_mpi": lambda job: job.backend == "mpi4py",
    "optimizers": lambda job: job.backend != "torch",
    "torch_job": lambda job: job.backend == "torch",
    "ordered": lambda job: not job.is_horovod and job.size > 1,
}
_BACKEND = os.environ.get("HVD_COMPRESS_BACKEND", "mpi4py")
# Files whose tests need one backend are not even imported elsewhere.
collect_ignore_glob = [
    files for files, backend in {"test_mpi*": "mpi4py", "test_ddp_*": "torch"}.items() if backend != _BACKEND
]


@pytest.hookimpl(trylast=True)  # once there is a terminal reporter
def pytest_configure(config: pytest.Config) -> None:
    global _job, _rendezvous, _pids, _stderr
    _stderr = os.dup(2)  # tests run with another
    faulthandler.register(signal.SIGUSR1, file=_stderr, all_threads=True)
    faulthandler.register(signal.SIGALRM, file=_stderr, all_threads=True, chain=True)  # print the stacks, then die
    signal.alarm(_ENDS_SECONDS)
    _job = join(_BACKEND)
    directory = tempfile.mkdtemp(prefix="hvd_compress_tests.") if _job.rank == 0 else ""
    _rendezvous = Rendezvous(Path(_job.allgather(directory)[0], "socket"), _job.rank, _job.size)
    shutil.rmtree(directory, ignore_errors=True)  # all have met; on other ranks there is none
    _pids = _job.allgather(os.getpid())
    signal.alarm(0)
    if _job.rank != 0:  # its report would be the same, but for failures, which every rank prints
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_report_header() -> str:
    return f"rank 0 of {_job.size}, {_job.backend}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lacking = {fixture for fixture, given in _NEEDS.items() if not given(_job)}
    left_out = {item for item in items if not lacking.isdisjoint(getattr(item, "fixturenames", ()))}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    _arm()
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "teardown" and report.passed and (left := left_over(_job, _LEFT_OVER_SECONDS)):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} leaves operations that rank {_job.rank} has posted and others have not: {', '.join(left)}. "
            "They would match those of a later test, and kill other ranks in hvd.join()."
        )
    if report.when == "setup" and report.passed:
        return report  # a rank that did not get so far says so in its next meeting, which is the others' after the call
    outcome = report.outcome
    if report.failed:
        _print_failure(report)
    signal.alarm(0)  # whom this rank waits for have a limit of their own
    outcomes = _rendezvous.meet(outcome, _GRACE_SECONDS if report.failed else None)
    _arm()
    if outcomes is None:
        _end_job()
    elif not report.failed and set(outcomes) != {outcome}:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: {report.when} {outcome} on rank {_job.rank}, but all ranks: {outcomes}"
    return report


def pytest_unconfigure() -> None:
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(_ENDS_SECONDS)
    sys.stdout.flush()
    _rendezvous.meet("end", _GRACE_SECONDS)
    time.sleep(_PRINT_SECONDS)  # the first that exits with an error ends the job, and the others are to print before


def _arm() -> None:
    global _armed
    signal.alarm(_TEST_SECONDS)
    if time.monotonic() - _armed > _REARM_SECONDS:
        _armed = time.monotonic()
        faulthandler.dump_traceback_later(_STACKS_SECONDS, file=_stderr)


def _end_job() -> None:
    _print(f"rank {_job.rank}: others wait for a rank that failed, or is gone. Their stacks:")
    for rank, pid in enumerate(_pids):
        if rank != _job.rank:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
    time.sleep(_PRINT_SECONDS)
    os._exit(1)


def _print_failure(report: pytest.TestReport) -> None:
    title = f" rank {_job.rank} of {_job.size}, {_job.backend}: {report.nodeid} failed in {report.when} "
    _print(f"{title:-^100}\n{report.longreprtext}\n" + "".join(f"{name}\n{text}" for name, text in report.sections))


def _print(text: str) -> None:
    os.write(_stderr, text.encode() + b"\n")


@pytest.fixture(scope="session")
def job() -> Job:
    return _job


@pytest.fixture
def alive() -> Callable[[], None]:
    """For a long test to call now and then: it makes progress, and has as much time again."""
    return _arm


@pytest.fixture
def several(job: Job) -> Job:
    """For tests that need more than one rank."""
    return job


@pytest.fixture
def horovod(several: Job) -> Job:
    """For tests of what only Horovod has."""
    return several


@pytest.fixture
def plain_mpi(job: Job) -> Job:
    """For tests of what only hvd_compress.mpi has."""
    return job


@pytest.fixture
def optimizers(job: Job) -> Job:
    """For tests of what distributed optimizers allow and DistributedDataParallel does in its own way: test_ddp_*."""
    return job


@pytest.fixture
def torch_job(job: Job) -> Job:
    """For tests of the hook of DistributedDataParallel."""
    return job


@pytest.fixture
def ordered(job: Job) -> Job:
    """For tests of transports that match collectives by their order."""
    return job
